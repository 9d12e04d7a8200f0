"""The truth: every stem of the system in plain PyTorch, any float dtype, published semantics.

One function per stem, in the order of the data flow; every other backend is tested against it.
"""

from __future__ import annotations

from .batch_norm import batch_norm, batch_norm_affine, batch_statistics, joined_statistics, rectified_affine
from .conv_stem import conv_stem, strided_conv2d
from .cs_attention import channel_attention, cs_attention, spatial_attention
from .dropout import counted_dropout, philox
from .dsc_block import dsc_block, pool_shortcut, separable_conv2d
from .emotion_head import average_clips, clip_cross_entropy, emotion_head, pool_tokens
from .frame_clips import clip_table, frame_clips
from .frame_statistics import cepstral_map, frame_statistics, frame_weights
from .fusion_lstm import fuse_inputs, fusion_lstm, lstm_branch
from .gradient_reversal import domain_head, gradient_reversal, reversal_schedule
from .log_mel import add_deltas, log_mel, mel_filters
from .normalize import normalize
from .resample import resample
from .resnet18 import BasicBlock, basic_block, resnet18
from .temporal_attention import temporal_attention, to_tokens
from .voice import add_voice, voice
from .voice_statistics import voice_statistics

__all__ = [
    "BasicBlock",
    "add_deltas",
    "add_voice",
    "average_clips",
    "basic_block",
    "batch_norm",
    "batch_norm_affine",
    "batch_statistics",
    "cepstral_map",
    "channel_attention",
    "clip_cross_entropy",
    "clip_table",
    "conv_stem",
    "counted_dropout",
    "cs_attention",
    "domain_head",
    "dsc_block",
    "emotion_head",
    "frame_clips",
    "frame_statistics",
    "frame_weights",
    "fuse_inputs",
    "fusion_lstm",
    "gradient_reversal",
    "joined_statistics",
    "log_mel",
    "lstm_branch",
    "mel_filters",
    "normalize",
    "philox",
    "pool_shortcut",
    "pool_tokens",
    "rectified_affine",
    "resample",
    "resnet18",
    "reversal_schedule",
    "separable_conv2d",
    "spatial_attention",
    "strided_conv2d",
    "temporal_attention",
    "to_tokens",
    "voice",
    "voice_statistics",
]
