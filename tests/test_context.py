"""What is installed belongs to one pipeline object and one call: copies, exchanged parts, nested calls, threads."""

import copy
import inspect
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModularPipeline
from tiny import CASES, EACH_FAMILY, PAINTING, QUICK, cases, dense_answer, picture, sparse_answer

from sparse_context import (
    ReferenceCache,
    SparseContextConfig,
    apply_sparse_context,
    last_selection,
    remove_sparse_context,
)
from sparse_context.context import Call, SparseContext
from sparse_context.tokens import ReferenceTokens

KEEP, MORE = 0.3, 0.6
REFUSAL = "^A pipeline with Sparse Context cannot be copied whole or pickled, .*: call remove_sparse_context first, .*$"
QWEN = [name for name in CASES if name.startswith("qwen")]


@pytest.fixture(params=cases(*EACH_FAMILY), scope="module")
def case(request):
    return CASES[request.param]


every_class = pytest.mark.parametrize("case", cases(), indirect=True)
each_way_to_the_pixels = pytest.mark.parametrize("case", cases(*EACH_FAMILY, *PAINTING), indirect=True)


def apply(pipe, keep):
    """As `sparse_answer` does."""
    apply_sparse_context(pipe, keep=keep, selector=QUICK)


@pytest.fixture
def pipe(case):
    pipe = case.build()
    apply(pipe, KEEP)
    return pipe


@pytest.fixture(scope="module")
def dense(case):
    return dense_answer(case)


@pytest.fixture(scope="module")
def sparse(case):
    return sparse_answer(case, KEEP)


@pytest.fixture(scope="module")
def less_sparse(case):
    return sparse_answer(case, MORE)


def hooks_of(pipe):
    modules = [pipe.transformer, *pipe.transformer.modules()]
    return [hook for m in modules for hook in (*m._forward_pre_hooks, *m._forward_hooks)]


def with_own_state(pipe):
    """The pipeline with a scheduler and a guider that no other has: what a call writes to."""
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    if getattr(pipe, "guider", None) is not None:
        pipe.guider = copy.deepcopy(pipe.guider)
    return pipe


def at_first_step(pipe, function):
    """Call `function` where the pipeline has done its first step, once: what a callback of any family does."""
    with_own_state(pipe)
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    def interrupted(*args, **kwargs):
        del scheduler.step
        made = step(*args, **kwargs)
        function()
        return made

    scheduler.step = interrupted


# Copies --------------------------------------------------------------------------------------------------------------


@every_class
def test_a_shallow_copy_is_sparse_on_its_own(case, pipe, sparse, less_sparse, dense):
    references = case.references()
    twin = copy.copy(pipe)
    assert type(twin).__name__ == type(pipe).__name__ and isinstance(twin, type(case.build()))
    assert torch.equal(case.call(twin, references), sparse)
    assert last_selection(pipe) is None and last_selection(twin).kept < last_selection(twin).total
    remove_sparse_context(twin)
    assert torch.equal(case.call(twin, references), dense) and torch.equal(case.call(pipe, references), sparse)
    kept = last_selection(pipe)
    apply(twin, MORE)
    assert torch.equal(case.call(twin, references), less_sparse) and torch.equal(case.call(pipe, references), sparse)
    assert last_selection(pipe).kept == kept.kept < last_selection(twin).kept
    grandchild = copy.copy(twin)
    remove_sparse_context(pipe)
    remove_sparse_context(twin)
    assert torch.equal(case.call(pipe, references), dense) and torch.equal(case.call(twin, references), dense)
    assert torch.equal(case.call(grandchild, references), less_sparse)
    assert type(pipe) is type(twin) is type(case.build())


def test_a_copy_of_an_untouched_pipeline_knows_nothing(case, sparse, dense):
    pipe = case.build()
    twin = copy.copy(pipe)
    apply(pipe, KEEP)
    assert last_selection(twin) is None
    assert torch.equal(case.call(twin, case.references()), dense)
    assert torch.equal(case.call(pipe, case.references()), sparse)


def other_scheduler(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=0.4)


def other_processor(pipe):
    pipe.image_processor = copy.deepcopy(pipe.image_processor)
    pipe.image_processor.register_to_config(do_normalize=False)


def changed(module):
    """A copy with other weights, the same at every call."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.2 * weight.std(correction=0).clamp_min(0.01) * torch.randn(weight.shape, generator=generator)
    return module


def other_vae(pipe):
    pipe.vae = changed(pipe.vae)


def other_transformer(pipe):
    pipe.transformer = changed(pipe.transformer)


def other_text_encoder(pipe):
    pipe.text_encoder = changed(pipe.text_encoder)


EXCHANGES = [other_scheduler, other_processor, other_vae, other_transformer]


def check_exchange(case, exchange, sparse):
    """The picture and the tokens are those of a pipeline to which Sparse Context was applied afterwards."""
    fresh = case.build()
    exchange(fresh)
    apply(fresh, KEEP)
    expected = case.call(fresh, case.references())
    assert not torch.equal(expected, sparse)
    pipe = case.build()
    apply(pipe, KEEP)
    twin = copy.copy(pipe)
    exchange(twin)
    assert torch.equal(case.call(twin, case.references()), expected)
    assert last_selection(twin).to_dict() | {"seconds": 0} == last_selection(fresh).to_dict() | {"seconds": 0}
    assert torch.equal(case.call(pipe, case.references()), sparse)
    if exchange is other_processor:  # not on a copy, too
        exchange(pipe)
        assert torch.equal(case.call(pipe, case.references()), expected)


@each_way_to_the_pixels
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.__name__)
def test_a_copy_uses_the_parts_that_it_has_by_then(case, exchange, sparse):
    check_exchange(case, exchange, sparse)


def test_a_copy_uses_its_own_text_encoder():
    check_exchange(CASES["longcat"], other_text_encoder, sparse_answer(CASES["longcat"], KEEP))


def test_a_copy_is_offloaded_on_its_own(case, pipe, sparse):
    twin = copy.copy(pipe)
    case.offload(twin)
    assert torch.equal(case.call(twin, case.references()), sparse)
    assert torch.equal(case.call(pipe, case.references()), sparse)


@each_way_to_the_pixels
def test_a_copy_made_in_the_middle_of_a_call_is_as_any_other(case, pipe, sparse, less_sparse):
    twins = []
    at_first_step(pipe, lambda: twins.append(copy.copy(pipe)))
    assert torch.equal(case.call(pipe, case.references()), sparse)
    (twin,) = twins
    assert last_selection(twin) is None
    assert torch.equal(case.call(twin, case.references()), sparse)
    apply(twin, MORE)
    assert torch.equal(case.call(twin, case.references()), less_sparse)
    remove_sparse_context(pipe)
    assert torch.equal(case.call(twin, case.references()), less_sparse)


def test_deep_copies_and_pickles_are_refused_in_one_sentence(case, pipe, sparse):
    for each in (pipe, copy.copy(pipe)):
        with pytest.raises(TypeError, match=REFUSAL):
            copy.deepcopy(each)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match=REFUSAL):
                pickle.dumps(each, protocol)
    assert torch.equal(case.call(pipe, case.references()), sparse)
    remove_sparse_context(pipe)
    copy.deepcopy(pipe)


def test_a_sparse_pipeline_looks_like_its_class(case, pipe, dense):
    plain = case.build()
    assert inspect.signature(pipe.__call__) == inspect.signature(plain.__call__)
    assert inspect.signature(type(pipe)) == inspect.signature(type(plain))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(pipe), name) == getattr(type(plain), name)
    assert isinstance(pipe, type(plain)) and repr(pipe) == repr(plain)
    # What is made from its class is a pipeline to which nothing was applied
    twin = case.share(pipe)
    twin.set_progress_bar_config(disable=True)
    assert type(twin) is type(case.share(plain)) and isinstance(twin, DiffusionPipeline | ModularPipeline)
    assert torch.equal(case.call(twin, case.references()), dense)


def test_a_sparse_pipeline_is_saved_under_its_class(tmp_path):
    pipe = CASES["klein"].build()
    apply(pipe, KEEP)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "Flux2KleinPipeline"
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(CASES["klein"].build()) and last_selection(loaded) is None


# Calls ---------------------------------------------------------------------------------------------------------------


@each_way_to_the_pixels
@pytest.mark.parametrize("inner", ["twin", "dense", "itself"])
def test_a_call_inside_a_call_has_its_own_tokens(case, pipe, sparse, less_sparse, dense, inner):
    """On the same transformer: by a copy that keeps more, by a pipeline that keeps all, by the pipeline itself."""
    references, made = case.references(), []
    other = {"twin": copy.copy(pipe), "dense": case.share(pipe), "itself": pipe}[inner]
    other.set_progress_bar_config(disable=True)
    if inner == "twin":
        apply(other, MORE)

    def call_other():
        scheduler, guider = pipe.scheduler, getattr(pipe, "guider", None)
        with_own_state(other)
        made.append((case.call(other, references), last_selection(other)))
        if inner == "itself":
            pipe.scheduler = scheduler
            if guider is not None:
                pipe.guider = guider

    at_first_step(pipe, call_other)
    assert torch.equal(case.call(pipe, references), sparse)
    ((picture_inside, selection),) = made
    assert torch.equal(picture_inside, {"twin": less_sparse, "dense": dense, "itself": sparse}[inner])
    assert (selection is None) == (inner == "dense")
    assert last_selection(pipe).kept == sum(int(KEEP * size + 0.5) for size in case.tokens(references))
    assert hooks_of(pipe) == []


@each_way_to_the_pixels
def test_the_selection_is_that_of_the_last_call_even_with_another_inside(case, pipe):
    if not case.without_references:
        other = [picture(64, 128, seed=3)]
    else:
        other = []
    seen = []

    def call_itself():
        scheduler, guider = pipe.scheduler, getattr(pipe, "guider", None)
        with_own_state(pipe)
        seen.append(last_selection(pipe).total)
        case.call(pipe, other)
        seen.append(last_selection(pipe))
        pipe.scheduler = scheduler
        if guider is not None:
            pipe.guider = guider

    at_first_step(pipe, call_itself)
    case.call(pipe, case.references())
    total = sum(case.tokens(case.references()))
    assert seen[0] == total == last_selection(pipe).total
    assert seen[1] is None if case.without_references else seen[1].total == sum(case.tokens(other))


@pytest.mark.parametrize("change", ["remove", "apply", "both"])
def test_what_is_switched_in_the_middle_of_a_call_holds_from_the_next_call(
    case, pipe, sparse, less_sparse, dense, change
):
    def switch():
        if change != "apply":
            remove_sparse_context(pipe)
        if change != "remove":
            apply(pipe, MORE)

    at_first_step(pipe, switch)
    assert torch.equal(case.call(pipe, case.references()), sparse)
    assert torch.equal(case.call(pipe, case.references()), dense if change == "remove" else less_sparse)
    remove_sparse_context(pipe)
    assert type(pipe) is type(case.build()) and hooks_of(pipe) == []


def test_a_call_inside_of_another_is_dense_once_it_is_removed(case, pipe, dense):
    made = []

    def call_again():
        before = dict(vars(pipe.scheduler))
        remove_sparse_context(pipe)
        made.append(case.call(pipe, case.references()))
        vars(pipe.scheduler).update(before)  # for the steps that are left of the call around it

    apply(pipe, KEEP)
    at_first_step(pipe, call_again)
    case.call(pipe, case.references())
    assert torch.equal(made[0], dense)


def test_too_few_keeps_are_told_where_references_are_encoded_together():
    pipe = CASES["klein"].build()
    apply_sparse_context(pipe, keep=[1, 1], together=True)
    with pytest.raises(ValueError, match="^keep has 2 values for 3 references"):
        CASES["klein"].call(pipe, CASES["klein"].references(3))


@each_way_to_the_pixels
def test_a_call_that_fails_leaves_nothing_behind(case, pipe, sparse, dense):
    before, blocks = dict(vars(pipe)), str(getattr(pipe, "_blocks", None))

    def fail():
        raise InterruptedError

    scheduler, guider = pipe.scheduler, getattr(pipe, "guider", None)
    at_first_step(pipe, fail)
    with pytest.raises(InterruptedError):
        case.call(pipe, case.references())
    assert hooks_of(pipe) == [] and str(getattr(pipe, "_blocks", None)) == blocks
    pipe.scheduler = scheduler
    if guider is not None:
        pipe.guider = guider
    written = {name for name, value in vars(pipe).items() if before.get(name) is not value}
    plain = case.build()
    at_first_step(plain, fail)
    with pytest.raises(InterruptedError):
        case.call(plain, case.references())
    assert written <= set(vars(plain))  # by the host itself
    assert torch.equal(case.call(pipe, case.references()), sparse)
    remove_sparse_context(pipe)
    assert torch.equal(case.call(pipe, case.references()), dense)


@each_way_to_the_pixels
def test_what_is_exchanged_in_the_middle_of_a_call_stays(case, pipe):
    parts = [copy.deepcopy(pipe.image_processor), copy.deepcopy(pipe.vae)]

    def exchange():
        pipe.image_processor, pipe.vae = parts

    at_first_step(pipe, exchange)
    case.call(pipe, case.references())
    assert pipe.image_processor is parts[0] and pipe.vae is parts[1]
    remove_sparse_context(pipe)
    assert pipe.image_processor is parts[0] and pipe.vae is parts[1]


def test_a_transformer_that_is_exchanged_in_the_middle_of_a_call_sees_the_tokens_promised(case, pipe):
    second, counts = changed(pipe.transformer), []
    at_first_step(pipe, lambda: setattr(pipe, "transformer", second))
    for transformer in (pipe.transformer, second):
        seen = []
        case.watch(transformer, seen)
        counts.append(seen)
    case.call(pipe, case.references())
    (before, _), (after, _) = (seen[0] for seen in counts)
    if not case.references_first:  # KV mode shows references to the first step alone
        assert before == after
    assert last_selection(pipe).kept < last_selection(pipe).total


class Wrapped:
    """An image processor of the user's own: what it does not know goes to another."""

    def __init__(self, processor):
        self.processor = processor
        self.calls = 0

    def preprocess(self, *args, **kwargs):
        self.calls += 1
        return self.processor.preprocess(*args, **kwargs)

    def __getattr__(self, name):
        if name == "config":
            raise AttributeError(name)
        return getattr(self.processor, name)


@each_way_to_the_pixels
def test_an_image_processor_of_the_users_own_is_used(case, pipe, sparse):
    pipe.image_processor = wrapper = Wrapped(pipe.image_processor)
    assert torch.equal(case.call(pipe, case.references()), sparse)
    assert wrapper.calls > 0 and pipe.image_processor is wrapper


@each_way_to_the_pixels
@pytest.mark.parametrize("patched", ["before", "after"])
def test_a_method_that_the_user_patched_is_called(case, patched, sparse):
    name = next(n for n in ("prepare_image_latents", "prepare_latents", "_blocks") if hasattr(case.build(), n))
    if name == "_blocks":
        return
    pipe, calls = case.build(), []
    if patched == "after":
        apply(pipe, KEEP)
    prepare = getattr(type(case.build()), name)
    setattr(pipe, name, lambda *args, **kwargs: calls.append(name) or prepare(pipe, *args, **kwargs))
    apply(pipe, KEEP)
    assert torch.equal(case.call(pipe, case.references()), sparse)
    assert calls == [name]


# More or fewer tokens than were seen ---------------------------------------------------------------------------------


def test_keep_refuses_grids_that_hold_another_number_of_tokens():
    call = Call(None, SparseContext(SparseContextConfig(), lambda pipe, call: None))
    tokens = ReferenceTokens(torch.zeros(1, 6, 2), torch.zeros(6, 3))
    for grids in ([], [(2, 2)], [(2, 3), (1, 1)]):
        total = sum(rows * columns for rows, columns in grids)
        sentence = f"^The pipeline made 6 reference tokens, but the references account for {total}. A part of it .*$"
        with pytest.raises(ValueError, match=sentence):
            call.keep(lambda: tokens, grids, lambda i, mask: None)


@pytest.mark.parametrize("name", cases("klein", "kontext", "qwen-edit", "qwen-edit-2509"))
def test_a_pipeline_that_makes_other_tokens_than_its_pictures_have_is_refused(name):
    case = CASES[name]
    pipe = case.build()
    method = "prepare_image_latents" if name == "klein" else "prepare_latents"
    prepare = getattr(pipe, method)

    def half(*args, **kwargs):
        made = list(prepare(*args, **kwargs))
        for i in {"klein": (0, 1), "kontext": (1, 3)}.get(name, (1,)):
            axis = -2
            made[i] = made[i].narrow(axis, 0, made[i].shape[axis] // 2)
        return tuple(made)

    setattr(pipe, method, half)
    apply(pipe, KEEP)
    with pytest.raises(ValueError, match="references account for .*: call remove_sparse_context"):
        case.call(pipe, case.references())
    assert last_selection(pipe) is None


# Threads -------------------------------------------------------------------------------------------------------------


def in_threads(functions):
    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result() for future in [threads.submit(function) for function in functions]]


def references_of(case, thread):
    """Of the same sizes, so that only the content tells them apart."""
    return [
        picture(*case.sizes[i % len(case.sizes)], seed=10 * thread + i)
        for i in range(min(case.usual, max(case.counts)))
    ]


def test_four_threads_over_four_copies_that_share_a_transformer_and_a_cache(case):
    keeps = [0.2, 0.3, 0.45, 1.0]
    plain, expected = case.build(), []
    for thread, keep in enumerate(keeps):
        apply_sparse_context(plain, keep=keep)
        expected.append(case.call(plain, references_of(case, thread)))
    pipe, cache = case.build(), ReferenceCache()
    apply_sparse_context(pipe, cache=cache)
    twins = [with_own_state(copy.copy(pipe)) for _ in keeps]
    for twin, keep in zip(twins, keeps, strict=True):
        apply_sparse_context(twin, keep=keep, cache=cache)

    def work(thread):
        return [case.call(twins[thread], references_of(case, thread)) for _ in range(3)]

    made = in_threads([lambda thread=thread: work(thread) for thread in range(4)])
    assert all(torch.equal(each, expected[thread]) for thread in range(4) for each in made[thread])
    assert hooks_of(pipe) == []
    for thread, keep in enumerate(keeps):  # and what it remembers now is right
        apply_sparse_context(pipe, keep=keep, cache=cache)
        assert torch.equal(case.call(pipe, references_of(case, thread)), expected[thread])


@pytest.mark.parametrize("name", cases("flux2-dev", "klein", "klein-kv", "klein-inpaint"))
def test_a_cache_is_right_after_threads_that_share_one_pipeline(name):
    """Which no pipeline is made for: its pictures may be wrong, and it may raise, but nobody else is to see that."""
    case = CASES[name]
    pipe, cache = case.build(), ReferenceCache()
    apply_sparse_context(pipe, keep=KEEP, cache=cache)

    def work(thread):
        for _ in range(3):
            try:
                case.call(pipe, references_of(case, thread))
            except Exception as error:
                del error  # of the scheduler, whose steps they share

    in_threads([lambda thread=thread: work(thread) for thread in range(4)])
    assert len(cache) > 0
    for thread in range(4):
        plain, cached = case.build(), case.build()
        apply_sparse_context(plain, keep=KEEP)
        apply_sparse_context(cached, keep=KEEP, cache=cache)
        expected = case.call(plain, references_of(case, thread))
        assert torch.equal(case.call(cached, references_of(case, thread)), expected)
    remove_sparse_context(pipe)
    assert type(pipe) is type(case.build())


@pytest.mark.parametrize("name", cases("flux2-dev", "klein", "klein-kv"))
def test_a_cache_is_right_whatever_order_a_pipeline_encodes_in(name):
    case = CASES[name]
    references = [picture(64, 64, seed) for seed in range(3)]
    plain, backwards, cache = case.build(), case.build(), ReferenceCache()
    apply_sparse_context(plain, keep=KEEP)
    expected = case.call(plain, references)
    prepare, encode = backwards.prepare_image_latents, type(backwards)._encode_vae_image

    def encode_backwards_first(images, *args, **kwargs):
        for image in images[::-1]:
            backwards._encode_vae_image(image=image, generator=None)
        return prepare(images, *args, **kwargs)

    backwards.prepare_image_latents = encode_backwards_first
    for _ in range(2):
        apply_sparse_context(backwards, keep=KEEP, cache=cache)
        assert torch.equal(case.call(backwards, references), expected)
    # A function of the user's own has no name to be remembered by
    for scale in (2.0, 3.0):
        pipe = case.build()
        pipe._encode_vae_image = lambda image, generator, pipe=pipe, scale=scale: scale * encode(pipe, image, generator)
        apply_sparse_context(pipe, keep=KEEP)
        wanted = case.call(pipe, references)
        apply_sparse_context(pipe, keep=KEEP, cache=cache)
        assert torch.equal(case.call(pipe, references), wanted)
    apply_sparse_context(plain, keep=KEEP, cache=cache)
    assert torch.equal(case.call(plain, references), expected)


# Qwen compiled whole -------------------------------------------------------------------------------------------------

# With references at t = 0, and without; where a call paints into its reference, and where not
COMPILED = ("qwen-edit-inpaint", "qwen-edit-2511")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(*p.values, how, marks=p.marks)
        for how in ("torch.compile", "module.compile")
        for p in cases(*COMPILED)
    ],
)
def test_qwen_is_one_graph_whether_compiled_dense_or_sparse_first(name, how):
    case = CASES[name]
    references = case.references()
    expected = {1.0: case.call(case.build(), references), KEEP: sparse_answer(case, KEEP)}
    for keeps in ((1.0, KEEP, 1.0), (KEEP, 1.0)):
        torch._dynamo.reset()
        pipe, graphs = case.build(), []

        def count(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        if how == "torch.compile":
            pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=count)
        else:
            pipe.transformer.compile(fullgraph=True, backend=count)
        for keep in keeps:
            apply(pipe, keep)
            if keep == 1.0:
                remove_sparse_context(pipe)
            before = len(graphs)
            assert (case.call(pipe, references) - expected[keep]).abs().max() < 1e-5
            # Module.compile also compiles the hook that puts an inpainting call's tokens in place, as a graph of one op
            assert len(graphs) - before <= (2 if how == "module.compile" and name == "qwen-edit-inpaint" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("qwen-edit-inpaint", "qwen-edit-2509"))
def test_other_counts_make_no_more_graphs_of_qwen(name):
    case = CASES[name]
    torch._dynamo.reset()
    pipe, graphs = case.build(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=count)
    for keep in (20, 31, 57):
        apply(pipe, keep)
        made = case.call(pipe, case.references())
    assert len(graphs) == 2
    assert (made - sparse_answer(case, 57)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(*COMPILED))
def test_qwen_compiled_without_fullgraph_has_no_graph_break(name):
    case = CASES[name]
    pipe = case.build()
    apply(pipe, KEEP)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    case.call(pipe, case.references())
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", cases(*QWEN))
def test_attention_kwargs_of_the_user_reach_the_transformer_and_are_left_alone(name):
    case = CASES[name]
    pipe, given, seen = case.build(), {"scale": 0.5}, []
    apply(pipe, KEEP)
    forward = pipe.transformer.forward

    def watched(*args, **kwargs):
        seen.append(dict(kwargs["attention_kwargs"]))
        return forward(*args, **kwargs)

    pipe.transformer.forward = watched
    case.call(pipe, case.references(), attention_kwargs=given)
    assert seen == [{"scale": 0.5}] * len(seen) and given == {"scale": 0.5} and pipe.attention_kwargs is given
    case.call(pipe, case.references())
    assert seen[-1] == pipe.attention_kwargs == {}
