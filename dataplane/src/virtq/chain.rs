//! The untrusted walk along a descriptor chain.
