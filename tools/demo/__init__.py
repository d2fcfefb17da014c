"""The demo: a made-up task, a tokenizer and a model so small that RLT visibly works on two CPU cores."""
