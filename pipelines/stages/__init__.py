"""What happens to a clip between the shards and the batch, a stage a file."""
