"""Switchgear and NVIDIA Dynamo under the same load, side by side on one machine."""
