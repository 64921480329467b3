"""Models of images, sounds and time series for the zoo, beside those of `architectures.py`, each with its inputs."""

from collections.abc import Callable
from typing import Any, Final

import torch
from architectures import HIDDEN, IMAGE, MEL_BINS, Draw, auto, image, sizes
from torch import Tensor, nn

IMAGE_TOKEN: Final = 126
SAMPLES: Final = 1600
"""Samples of a sound."""
STEPS: Final = 32
"""Observations of a time series."""


def _pixels(side: int = IMAGE) -> Callable[[Draw], dict[str, Tensor]]:
    return lambda draw: {"pixel_values": draw.normal(3, side, side)}


def _sound(draw: Draw) -> dict[str, Tensor]:
    return {"input_values": draw.normal(SAMPLES)}


def _image_and_text(image_tokens: int, pixels: tuple[int, ...] = (3, IMAGE, IMAGE)) -> Callable[[Draw], dict[str, Any]]:
    """An image, and a prompt that begins with its tokens."""

    def make(draw: Draw) -> dict[str, Tensor]:
        ids = torch.cat((draw.full(IMAGE_TOKEN, image_tokens), draw.ids()), 1)
        return {"pixel_values": draw.normal(*pixels), "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make


def _qwen_vl(draw: Draw) -> dict[str, Tensor]:
    """Images of 4 by 4 patches, whose tokens merge 2 by 2 of them."""
    arguments = _image_and_text(4)(draw)
    ids = arguments["input_ids"]
    grid = torch.tensor([[1, 4, 4]]).expand(draw.batch, 3).contiguous()
    pixels = draw.normal(16, 3 * 2 * 8 * 8).flatten(0, 1)
    return {
        **arguments,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


def _paligemma_inputs(draw: Draw) -> dict[str, Tensor]:
    arguments = _image_and_text(4)(draw)
    return {**arguments, "token_type_ids": torch.zeros_like(arguments["input_ids"])}


def _composite(
    model_type: str, text: str, vision: str, auto_class: str = "AutoModelForImageTextToText", **changes: Any
):
    """A builder: a language model with an image encoder; `text_config` and `vision_config` change their configs."""

    def make() -> nn.Module:
        parts = {
            part: {"model_type": kind, **sizes(kind), **changes.get(part, {})}
            for part, kind in (("text_config", text), ("vision_config", vision))
        }
        return auto(auto_class, model_type, **{**changes, **parts})()

    return make


_QWEN_VISION: Final[dict[str, Any]] = {"depth": 2, "num_heads": 4, "out_hidden_size": HIDDEN, "patch_size": 8}
_QWEN_TOKENS: Final[dict[str, Any]] = {
    **{"image_token_id": IMAGE_TOKEN, "video_token_id": 125, "vision_start_token_id": 124, "vision_end_token_id": 123}
}
_ROPE_3D: Final = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SPEECH: Final[dict[str, Any]] = {
    **{"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 16},
    **{"num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "apply_spec_augment": False},
}
_SERIES: Final[dict[str, Any]] = {"context_length": STEPS, "prediction_length": 8, "patch_length": 8, "patch_stride": 8}


def _swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    dimensions: dict[str, Any] = {"embed_dim": HIDDEN, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
    return SwinForImageClassification(SwinConfig(image_size=IMAGE, patch_size=4, num_labels=10, **dimensions))


def _whisper(draw: Draw) -> dict[str, Tensor]:
    return {"input_features": draw.normal(MEL_BINS, 128), "decoder_input_ids": draw.ids()}


VISION_LANGUAGE: Final = {
    "llava": (
        _composite("llava", "llama", "clip_vision_model", image_token_index=IMAGE_TOKEN, image_seq_length=4),
        _image_and_text(4),
    ),
    "paligemma": (
        _composite(
            "paligemma",
            "gemma",
            "siglip_vision_model",
            image_token_index=IMAGE_TOKEN,
            projection_dim=HIDDEN,
            vision_config={"vision_use_head": False},
        ),
        _paligemma_inputs,
    ),
    "gemma3_vision": (
        _composite(
            "gemma3",
            "gemma3_text",
            "siglip_vision_model",
            image_token_index=IMAGE_TOKEN,
            mm_tokens_per_image=4,
            boi_token_index=124,
            eoi_token_index=125,
            vision_config={"vision_use_head": False, "image_size": 32},
            text_config={"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
        ),
        _image_and_text(4, (3, 32, 32)),
    ),
    "qwen2_vl": (
        _composite(
            "qwen2_vl",
            "qwen2_vl_text",
            "qwen2_vl_vision",
            vision_config={**_QWEN_VISION, "embed_dim": HIDDEN, "hidden_size": HIDDEN},
            text_config={"rope_parameters": _ROPE_3D},
            **_QWEN_TOKENS,
        ),
        _qwen_vl,
    ),
    "qwen2_5_vl": (
        _composite(
            "qwen2_5_vl",
            "qwen2_5_vl_text",
            "qwen2_5_vl_vision",
            vision_config={**_QWEN_VISION, "fullatt_block_indexes": (1,), "window_size": 16},
            text_config={"rope_parameters": _ROPE_3D},
            **_QWEN_TOKENS,
        ),
        _qwen_vl,
    ),
    "qwen3_vl": (
        _composite(
            "qwen3_vl",
            "qwen3_vl_text",
            "qwen3_vl_vision",
            vision_config={**_QWEN_VISION, "deepstack_visual_indexes": (0,), "num_position_embeddings": 16},
            text_config={"rope_parameters": _ROPE_3D},
            **_QWEN_TOKENS,
        ),
        _qwen_vl,
    ),
    "smolvlm": (
        _composite("smolvlm", "llama", "smolvlm_vision", image_token_id=IMAGE_TOKEN, scale_factor=2),
        _image_and_text(1, (1, 3, IMAGE, IMAGE)),
    ),
    "internvl": (
        _composite(
            "internvl",
            "qwen2",
            "internvl_vision",
            image_token_id=IMAGE_TOKEN,
            image_seq_length=1,
            vision_config={"image_size": (16, 16), "patch_size": (8, 8)},
        ),
        _image_and_text(1),
    ),
}
TRACED_WITHOUT_IMAGE: Final = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Once more with a text as the example: the language model is quantized, and generates from images all the same."""
SOUND: Final = {
    "wav2vec2": (auto("AutoModelForCTC", "wav2vec2", **_SPEECH), _sound),
    "hubert": (auto("AutoModelForCTC", "hubert", **_SPEECH), _sound),
    "wavlm": (auto("AutoModelForAudioClassification", "wavlm", num_labels=5, **_SPEECH), _sound),
    "ast": (
        auto("AutoModelForAudioClassification", "audio-spectrogram-transformer", max_length=32, num_labels=5),
        lambda draw: {"input_values": draw.normal(32, MEL_BINS)},
    ),
    "moonshine": (
        auto(
            "AutoModelForSpeechSeq2Seq",
            "moonshine",
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            tie_word_embeddings=False,
        ),
        lambda draw: {"input_values": draw.normal(4096), "decoder_input_ids": draw.ids()},
    ),
    "speech_to_text": (
        auto("AutoModelForSpeechSeq2Seq", "speech_to_text", input_feat_per_channel=MEL_BINS, conv_channels=32),
        lambda draw: {"input_features": draw.normal(32, MEL_BINS), "decoder_input_ids": draw.ids()},
    ),
}
IMAGES: Final = {
    "deit": (auto("DeiTForImageClassification", "deit", num_labels=10), _pixels()),
    "swin": (_swin, _pixels()),
    "convnext": (image("convnext", hidden_sizes=[32, HIDDEN], depths=[1, 1], num_stages=2, patch_size=4), _pixels()),
    "segformer": (
        auto(
            "AutoModelForSemanticSegmentation",
            "segformer",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[32, HIDDEN],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
            decoder_hidden_size=HIDDEN,
            num_labels=5,
        ),
        _pixels(32),
    ),
    "yolos": (
        auto("AutoModelForObjectDetection", "yolos", image_size=[16, 16], num_detection_tokens=5, num_labels=5),
        _pixels(),
    ),
    "dinov3": (auto("AutoModel", "dinov3_vit"), _pixels()),
}
TIME_SERIES: Final = {
    "patchtst": (
        auto("PatchTSTForPrediction", "patchtst", num_input_channels=2, **_SERIES),
        lambda draw: {"past_values": draw.normal(STEPS, 2)},
    ),
    "patchtsmixer": (
        auto("PatchTSMixerForPrediction", "patchtsmixer", num_input_channels=2, **_SERIES),
        lambda draw: {"past_values": draw.normal(STEPS, 2)},
    ),
}
