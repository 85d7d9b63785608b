"""What stands in a log → ids and blocks, as the features say."""
