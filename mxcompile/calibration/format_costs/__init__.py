"""What a format costs the model, in nats of KL divergence a token: three estimates for passes that choose formats."""
