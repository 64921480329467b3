class LoadConfig:
    load_format: str

class ModelConfig:
    enforce_eager: bool

class VllmConfig:
    load_config: LoadConfig
    model_config: ModelConfig

def get_current_vllm_config() -> VllmConfig: ...
