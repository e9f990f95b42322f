//! What the switch counts, and whether it adds up.

use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

use crate::switch::{Port, Switch};

/// Reasons of drops that happen before a frame counts as received.
const AT_THE_DOOR: [&str; 4] = ["missed", "runt", "oversize", "bad_offload"];

/// Frames of all ports that there are or were.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    received: u64,
    made: u64,
    sent: u64,
    merged: u64,
    held: u64,
    drops: BTreeMap<String, u64>,
}

impl Totals {
    /// What the switch says now.
    pub fn read(switch: &Switch) -> Result<Self> {
        Self::parse(&switch.json(&["status"])?["totals"])
    }

    fn parse(totals: &Value) -> Result<Self> {
        let count = |name: &str| totals[name].as_u64().with_context(|| format!("no {name} in {totals}"));
        let drops = totals["drops"].as_object().into_iter().flatten();
        Ok(Self {
            received: count("rx_frames")?,
            made: count("made_frames")?,
            sent: count("tx_frames")?,
            merged: count("merged_frames")?,
            held: count("held_frames")?,
            drops: drops.map(|(reason, count)| (reason.clone(), count.as_u64().unwrap_or(0))).collect(),
        })
    }

    /// Frames dropped after they were received.
    pub fn dropped(&self) -> u64 {
        let inside = self.drops.iter().filter(|(reason, _)| !AT_THE_DOOR.contains(&reason.as_str()));
        inside.map(|(_, count)| count).sum()
    }

    /// Frames received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Frames sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Frames dropped, by reason.
    pub fn drops(&self) -> &BTreeMap<String, u64> {
        &self.drops
    }

    /// Frames that were received or made and of which it is not known what became of them; negative if there are more
    /// that were sent or dropped.
    pub fn unaccounted(&self) -> i128 {
        let (came, went) = (self.received + self.made, self.sent + self.merged + self.held + self.dropped());
        i128::from(came) - i128::from(went)
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { received, made, sent, merged, held, drops } = self;
        write!(f, "{received} received + {made} made; {sent} sent, {merged} merged, {held} held, dropped {drops:?}")
    }
}

/// What the switch counts at each port.
#[derive(Debug, Clone, Default)]
pub struct Ports(BTreeMap<String, Port>);

impl Ports {
    /// What it says now.
    pub fn read(switch: &Switch) -> Result<Self> {
        let list = switch.json(&["port", "list"])?;
        let named = |port: &Value| Some((port["name"].as_str()?.to_owned(), Port(port.clone())));
        Ok(Self(list.as_array().into_iter().flatten().filter_map(named).collect()))
    }

    /// Frames that each has received and sent.
    pub fn counts(&self) -> BTreeMap<String, (u64, u64)> {
        let of = |port: &Port| (port.count("rx_frames"), port.count("tx_frames"));
        self.0.iter().map(|(name, port)| (name.clone(), of(port))).collect()
    }

    /// Frames dropped at a port, for whatever reason.
    pub fn dropped(&self, name: &str) -> u64 {
        self.0.get(name).map_or(0, Port::dropped)
    }

    /// Their names and states.
    pub fn states(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, port)| (name.as_str(), port.state()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn totals(sent: u64) -> Totals {
        let drops = json!({"full": 3, "runt": 100, "missed": 50, "no_destination": 2});
        let value = json!({"rx_frames": 20, "made_frames": 4, "tx_frames": sent, "merged_frames": 1, "held_frames": 2,
            "drops": drops});
        Totals::parse(&value).unwrap()
    }

    #[test]
    fn what_comes_in_has_to_go_somewhere() {
        assert_eq!(totals(16).unaccounted(), 0);
        assert_eq!(totals(15).unaccounted(), 1);
        assert_eq!(totals(18).unaccounted(), -2);
        assert_eq!(totals(16).dropped(), 5);
        assert!(Totals::parse(&json!({})).is_err());
    }
}
