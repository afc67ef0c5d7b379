"""Names of what a run leaves in its output folder."""

RUN_NAME = "run.json"  # settings, cache, student
EVALUATION_NAME = "eval.json"  # metrics on the held-out cache
STATE_NAME = "trainer_state.json"  # transformers' log history
ANSWERS_NAME = "generate"  # folder of what `trainer eval --generate` scored
MODEL_FILES = ("model*.safetensors*", "pytorch_model*", "adapter_config.json", "adapter_model.*")  # the model itself
