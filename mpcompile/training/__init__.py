"""What distillation is made of: losses, features, masks in training, checkpoints, ranks, data, recipes."""
