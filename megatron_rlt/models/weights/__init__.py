"""Converts weights between Hugging Face folders and Megatron shards by one table of names."""

from megatron_rlt.models.weights.export import Destination, export_tensors, save_hf_folder
from megatron_rlt.models.weights.load import load_hf_weights

__all__ = ["Destination", "export_tensors", "load_hf_weights", "save_hf_folder"]
