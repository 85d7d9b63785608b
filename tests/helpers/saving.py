"""A small configuration for tests that save checkpoints."""

import dataclasses

import small


def configured(run_dir, dense_sharding="replicated"):
    config = small.config()
    train = dataclasses.replace(
        config.train, output_dir=str(run_dir), dense_sharding=dense_sharding
    )
    return dataclasses.replace(config, train=train)
