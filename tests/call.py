"""What the tiny models of the tests want of a call, as their `call.json` has it."""

CALL = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "max_sequence_length": 12,
    "text_encoder_out_layers": [1, 2],
    "reference_size": 64,
    "max_references": 3,
}
