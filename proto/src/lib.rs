//! gRPC contracts of Sluice.
