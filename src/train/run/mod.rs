//! A training run: optimizer, schedule, checkpoints, metrics, reports.
