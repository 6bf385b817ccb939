"""`headinfer evaluate`: what a model predicts under each way of holding its KV cache."""
