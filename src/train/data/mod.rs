//! Files of examples: their layouts, the chat template, and which tokens the loss falls on.
