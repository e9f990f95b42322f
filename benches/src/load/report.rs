//! What came of it.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::plan::Role;
use super::port::{Findings, Port};

/// Latencies in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Samples.
    pub count: u64,
    /// Smallest.
    pub min: u64,
    /// Half of all are below.
    pub p50: u64,
    /// Nine of ten are below.
    pub p90: u64,
    /// 99 of 100 are below.
    pub p99: u64,
    /// 999 of 1000 are below.
    pub p999: u64,
    /// Largest.
    pub max: u64,
    /// Average.
    pub mean: f64,
}

impl Latency {
    /// The percentiles of a histogram; nothing if it is empty.
    pub fn of(histogram: &Histogram<u64>) -> Option<Self> {
        let at = |percentile| histogram.value_at_percentile(percentile);
        (!histogram.is_empty()).then(|| Self {
            count: histogram.len(),
            min: histogram.min(),
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            p999: at(99.9),
            max: histogram.max(),
            mean: histogram.mean(),
        })
    }
}

/// What one port has done in the measured time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PortReport {
    /// Frames sent.
    pub sent: u64,
    /// Frames received.
    pub received: u64,
}

/// What came of a run. Counters are of the measured time, but `lost` and what follows it, which are of the whole run
/// after learning, to the last frame.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Seconds measured.
    pub seconds: f64,
    /// Frames that the ports in pairs received.
    pub received: u64,
    /// Frames that they sent.
    pub sent: u64,
    /// Million frames received per second.
    pub mpps: f64,
    /// Bits of them per second, in 10^9, without checksum and gap.
    pub gbps: f64,
    /// Frames that never arrived.
    pub lost: u64,
    /// Frames that were due (`--rate`) but found the ring full.
    pub held_back: u64,
    /// Frames looked at that were what they had to be.
    pub verified: u64,
    /// Frames looked at that were not the peer's, came out of order, had another length, or came after a gap of so many.
    pub foreign: u64,
    /// See `foreign`.
    pub misplaced: u64,
    /// See `foreign`.
    pub wrong_length: u64,
    /// See `foreign`.
    pub missing: u64,
    /// Wake-ups that the switch asked for.
    pub kicks: u64,
    /// Share of the time in which the generator had something to do.
    pub generator_busy: f64,
    /// Nanoseconds that the generator spent on a frame, receiving and sending it.
    pub generator_ns: f64,
    /// CPU seconds of the generator per second.
    pub generator_cpu: f64,
    /// Times that the generator was held up by something else.
    pub generator_pauses: u64,
    /// Samples of latency left out for that.
    pub discarded: u64,
    /// Pages found marked in logs of dirty pages, each time that these were looked at.
    #[serde(default)]
    pub dirtied: u64,
    /// Latencies.
    pub latency: Option<Latency>,
    /// Each port.
    pub ports: Vec<PortReport>,
}

/// Sums over all ports in pairs.
pub(super) fn findings(ports: &[Port]) -> Findings {
    let pairs = ports.iter().filter(|port| port.role == Role::Pair);
    pairs.flat_map(|port| &port.receivers).fold(Findings::default(), |sum, receiver| {
        let one = &receiver.findings;
        Findings {
            good: sum.good + one.good,
            foreign: sum.foreign + one.foreign,
            missing: sum.missing + one.missing,
            misplaced: sum.misplaced + one.misplaced,
            wrong_length: sum.wrong_length + one.wrong_length,
            discarded: sum.discarded + one.discarded,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_samples() {
        let mut histogram = Histogram::new(3).unwrap();
        assert_eq!(Latency::of(&histogram), None);
        (1..=1000).for_each(|value| histogram.record(value).unwrap());
        let latency = Latency::of(&histogram).unwrap();
        assert_eq!((latency.count, latency.min, latency.p50, latency.p99), (1000, 1, 500, 990));
        assert!((999..=1000).contains(&latency.p999) && latency.max == 1000, "{latency:?}");
    }

    #[test]
    fn reports_survive_json() {
        let report =
            Report { received: 7, latency: Some(Latency { p99: 3, ..Latency::default() }), ..Report::default() };
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
