//! Sluice, a userspace vhost-user switch.
