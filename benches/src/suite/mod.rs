//! The whole set of measurements: ours and its peers in turn, round after round, so that a drifting machine hits all of
//! them alike.

pub mod bars;
pub mod cases;
pub mod dpdk;
pub mod host;
pub mod iperf;
pub mod markdown;
pub mod peers;
pub mod plot;
pub mod results;
pub mod rounds;
