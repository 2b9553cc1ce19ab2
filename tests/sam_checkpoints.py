"""Tiny Segment Anything checkpoints in Hugging Face's format, of the real classes, with random weights: no download."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

DECODER: dict[str, Any] = {
    "hidden_size": 16,
    "mlp_dim": 24,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 12,
}
SIDE = 128  # of the square frame, in pixels


def prompted(patch: int = 16, side: int = SIDE) -> dict[str, Any]:
    """The halves that SAM, SAM 2, EdgeTAM and SAM 3 have alike."""
    encoder = {"hidden_size": 16, "image_size": side, "patch_size": patch, "mask_input_channels": 8}
    return {"prompt_encoder_config": encoder, "mask_decoder_config": DECODER}


HIERA = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 2, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [4],
        "window_positional_embedding_background_size": [4, 4],
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "fpn_hidden_size": 16,
}
REPVIT = {
    "backbone_config": {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1",
        "num_classes": 2,
        "initializer_range": 0.02,
        "model_args": {
            "in_chans": 3,
            "features_only": True,
            "out_indices": [0, 1, 2, 3],
            "embed_dim": [8, 16, 24, 32],
            "depth": [1, 1, 1, 1],
        },
    },
    "backbone_channel_list": [32, 24, 16, 8],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "fpn_hidden_size": 16,
}
SAM3_SIDE = 112
SAM3_VIT = {
    "backbone_config": {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SAM3_SIDE,
        "pretrain_image_size": 56,
        "window_size": 4,
        "global_attn_indexes": [2],
    },
    "fpn_hidden_size": 16,
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
}
MEMORY: dict[str, Any] = {
    "memory_attention_hidden_size": 16,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 16,
    "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": 16,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": 16,
    "memory_fuser_embed_dim": 16,
    "memory_fuser_intermediate_dim": 16,
}
SAM3: dict[str, Any] = {
    "vision_config": {"model_type": "sam3_vision_model", **SAM3_VIT},
    "text_config": {
        "model_type": "clip_text_model",
        "vocab_size": 514,
        "hidden_size": 24,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "hidden_act": "gelu",
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    },
    "geometry_encoder_config": {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    "detr_encoder_config": {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    "detr_decoder_config": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_queries": 7,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    },
    "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "sam": {
        "vision_config": {
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 16,
            "window_size": 4,
            "global_attn_indexes": [2],
            "num_pos_feats": 8,
            "mlp_dim": 24,
            "initializer_range": 0.02,
        },
        **prompted(),
    },
    "sam2": {"vision_config": {"model_type": "sam2_vision_model", **HIERA}, **prompted()},
    "sam2_video": {
        "vision_config": {"model_type": "sam2_vision_model", **HIERA},
        **prompted(),
        **MEMORY,
        "image_size": SIDE,
    },
    "edgetam": {"vision_config": {"model_type": "edgetam_vision_model", **REPVIT}, **prompted()},
    "sam3_tracker": {"vision_config": {"model_type": "sam3_vision_model", **SAM3_VIT}, **prompted(14, SAM3_SIDE)},
    "sam3": SAM3,
    "sam3_video": {
        "detector_config": {"model_type": "sam3", **SAM3},
        "tracker_config": {
            "model_type": "sam3_tracker_video",
            "vision_config": {"model_type": "sam3_vision_model", **SAM3_VIT},
            **prompted(14, SAM3_SIDE),
            **MEMORY,
            "image_size": SAM3_SIDE,
        },
        "low_res_mask_size": 32,
    },
}
MODELS = {
    "sam": "SamModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2VideoModel",
    "edgetam": "EdgeTamModel",
    "sam3_tracker": "Sam3TrackerModel",
    "sam3": "Sam3Model",
    "sam3_video": "Sam3VideoModel",
}
SQUARE = {"height": SIDE, "width": SIDE}
SQUARE3 = {"height": SAM3_SIDE, "width": SAM3_SIDE}
TWO: dict[str, Any] = {"size": SQUARE, "image_processor_type": "Sam2ImageProcessorFast"}
THREE: dict[str, Any] = {
    "size": SQUARE3,
    "image_processor_type": "Sam3ImageProcessorFast",
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
PICTURES: dict[str, dict[str, Any]] = {
    "sam": {"size": {"longest_edge": SIDE}, "pad_size": SQUARE, "image_processor_type": "SamImageProcessor"},
    **dict.fromkeys(("sam2", "sam2_video", "edgetam"), TWO),
    **dict.fromkeys(("sam3_tracker", "sam3", "sam3_video"), THREE),
}
PROMPTABLE = ("sam", "sam2", "sam2_video", "edgetam", "sam3_tracker", "sam3_video")


def enliven(model: torch.nn.Module) -> None:
    """Random weights of such size that results depend on everything; as made, much is zero or next to it."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + noise.abs())
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.add_(0.3 * noise)
        elif tensor.ndim > 1 and "positional_embedding" not in name:
            tensor.copy_(1.5 * noise / tensor[0].numel() ** 0.5)


@cache
def model(kind: str) -> Any:
    """A model of a type of transformers, with random weights."""
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, MODELS[kind])(config).eval()
    enliven(made)
    return made


def save(kind: str, folder: Path) -> Path:
    """Save a checkpoint as the hub has it: configuration, safetensors, the image processor's settings."""
    if kind == "sam3_video":  # which transformers saves with a prefix twice, and does not read again
        model(kind).config.save_pretrained(folder)
        save_file(
            {name: tensor.clone() for name, tensor in model(kind).state_dict().items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    else:
        model(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES[kind]), "utf-8")
    return folder
