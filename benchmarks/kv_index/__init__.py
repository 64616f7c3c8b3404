"""The KV index beside NVIDIA Dynamo's radix tree."""
