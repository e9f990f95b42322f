//! vhost-user ports.

pub mod queue;
