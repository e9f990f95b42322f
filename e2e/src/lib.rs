//! Harness of the systems tests.
