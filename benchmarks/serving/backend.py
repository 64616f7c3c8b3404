"""An OpenAI server without a model, for gateways that only pass HTTP on: `--port`, `--model`, `--step-ms`.

What it leaves out makes it cheap: it neither tokenises nor applies a template, and its tokens are
all the same word. Each answer is a task of its own that wakes once a step, as servers of their kind do.
"""
