from typing import Any

class LoadConfig:
    load_format: str
    download_dir: str | None

class SchedulerConfig:
    max_num_batched_tokens: int
    max_num_seqs: int

class ModelConfig:
    enforce_eager: bool

class VllmConfig:
    load_config: LoadConfig
    model_config: ModelConfig
    scheduler_config: SchedulerConfig
    additional_config: Any

def get_current_vllm_config() -> VllmConfig: ...
