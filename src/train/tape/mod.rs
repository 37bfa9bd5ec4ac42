//! The decoder recorded: loss and gradients.
