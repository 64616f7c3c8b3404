"""Who holds which KV blocks: follows the workers' KV events and answers routers."""
