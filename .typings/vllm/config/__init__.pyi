class LoadConfig:
    load_format: str

class VllmConfig:
    load_config: LoadConfig

def get_current_vllm_config() -> VllmConfig: ...
