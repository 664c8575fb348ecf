"""Flamingo, one tensor at a time. Written by the notebooks in book/; see README.md."""

from importlib import import_module

_HOME = {
    "VisionEncoder": "vision",
    "load_vision_encoder": "vision",
    "FeedForward": "perceiver",
    "PerceiverAttention": "perceiver",
    "PerceiverResampler": "perceiver",
    "text_time": "cross_attention",
    "media_time": "cross_attention",
    "text_to_media_mask": "cross_attention",
    "MaskedCrossAttention": "cross_attention",
    "GatedCrossAttentionBlock": "cross_attention",
    "extend_instance": "layers",
    "FlamingoLayer": "layers",
    "FlamingoLMMixin": "layers",
    "DATA": "model",
    "pixels_to_patches": "model",
    "check_pictures": "model",
    "Flamingo": "model",
    "train_new_rows_only": "model",
    "DECODER_LAYERS": "model",
    "load_language_model": "model",
    "create_model_and_transforms": "model",
    "SIZES": "model",
    "build_flamingo": "model",
    "trained_tensors": "model",
    "save_flamingo": "model",
    "load_flamingo": "model",
    "IGNORE": "loss",
    "make_labels": "loss",
    "shifted_cross_entropy": "loss",
    "SIZE": "data",
    "RELATIONS": "data",
    "SPECIAL_TOKENS": "data",
    "check_text": "data",
    "read_picture": "data",
    "check_row": "data",
    "load_captions": "data",
    "load_sprites": "data",
    "draw_scene": "data",
    "is_held_out": "data",
    "make_scenes": "data",
    "interleave": "data",
    "encode_pictures": "data",
    "collate": "data",
    "parameter_groups": "training",
    "orthogonalise": "training",
    "Muon": "training",
    "make_optimizers": "training",
    "schedule": "training",
    "batch_for_step": "training",
    "save_checkpoint": "training",
    "load_checkpoint": "training",
    "train": "training",
    "caption_losses": "training",
    "caption_features": "training",
    "score_captions": "training",
    "bootstrap_interval": "training",
}
__all__ = list(_HOME)


def __getattr__(name):
    """Import a name's module when the name is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
