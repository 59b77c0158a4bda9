"""The rows of a data set that the `datasets` library reads."""

from collections.abc import Sequence
from dataclasses import replace

from .rows import FIELDS, RowRules, make_sample
from .sample import ManifestError

FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet")  # of the `datasets` library

DIFFUSERS = {
    "image": ("instance_image", "instance_images", "instance"),
    "references": ("cond_image", "cond_images", "cond"),
    "prompt": ("caption", "instance_prompt", "text"),
}
"""Columns as the training scripts of diffusers call them, for fields that a data set has under no other name."""


class Table(Sequence):
    """The rows of a data set of the `datasets` library, each made into a sample when it is taken.

    notes: which columns are read as fields of another name. split, config: those that are read. What
    `save_to_disk` wrote has no config, and a single table no split: None then.
    """

    notes: tuple[str, ...] = ()
    split: str | None = None
    config: str | None = None

    def __init__(self, source: str, split: str, config: str | None, rules: RowRules) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ManifestError(
                f"Reading {source} needs the datasets library: pip install 'sparse-context[train]', or pass a JSONL "
                "manifest."
            ) from error
        folder = rules.folder
        try:
            if folder is not None and any((folder / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
                table = datasets.load_from_disk(source)
                if isinstance(table, datasets.DatasetDict):
                    if split not in table:  # as the library says it of the others
                        raise ValueError(f'Unknown split "{split}". Should be one of {list(table)}')
                    table, self.split = table[split], split
            else:
                builder = datasets.load_dataset_builder(source, config)
                kind = next((k for k in FORMATS for cls in type(builder).__mro__ if f".{k}." in cls.__module__), None)
                if kind is None:  # some of the others unpickle
                    raise ValueError(f"only {', '.join(FORMATS)} are read, for safety")
                builder.download_and_prepare()
                table = builder.as_dataset(split=split)
                self.split, self.config = split, builder.config.name
        except Exception as error:  # the library raises many kinds, and all of them mean this
            chain = [str(link) for link in (error, error.__cause__) if link is not None]
            reasons = [" ".join(text.split())[:300].rstrip(".") for text in chain]
            reason = ": ".join(filter(None, reasons)) or type(error).__name__
            raise ManifestError(f"The data set {source} does not load: {reason}.") from error
        rules = self._with_columns_of_diffusers(rules, table.column_names, source)
        for field in ("references", "prompt", *(["image"] if rules.needs_image else []), *rules.columns):
            if rules.column(field) not in table.column_names:
                also = " A JSONL manifest is named by its own file." if folder and any(folder.glob("*.jsonl")) else ""
                raise ManifestError(
                    f"The data set {source} has no column {rules.column(field)!r} for the field {field!r}: its columns "
                    f"are {', '.join(table.column_names)}.{also}"
                )
        names = [*(rules.column(field) for field in FIELDS), *rules.others]
        table = table.select_columns([name for name in names if name in table.column_names])
        for name in table.column_names:  # so that a picture is decoded here, by images.py, and by nothing else
            feature = table.features[name]
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self._table, self._rules = table, rules

    def _with_columns_of_diffusers(self, rules: RowRules, columns: Sequence[str], source: str) -> RowRules:
        found = {
            field: next((name for name in names if name in columns), field)
            for field, names in DIFFUSERS.items()
            if field not in rules.columns and field not in columns
        }
        found = {field: name for field, name in found.items() if field != name}
        if found:
            told = ", ".join(f"{name} as {field}" for field, name in found.items())
            self.notes = (f"{source}: reads the column {told}; name other columns where that is wrong.",)
        return replace(rules, columns={**rules.columns, **found})

    def __len__(self) -> int:
        return len(self._table)

    def row(self, i: int) -> dict[str, object]:
        """Row `i` as it is in the data set: its columns, and `RowRules.others`."""
        return self._table[i]

    def __getitem__(self, i):
        i = range(len(self))[i]
        where = f"row {i + 1}"
        return where, make_sample(self._table[i], where, f"{i + 1:06}", self._rules)
