//! From text to [`Expr`].

use std::net::IpAddr;
use std::str::FromStr;

use super::{Expr, MAX_LENGTH, Prefix, Side, Term};
use crate::limits::{MAX_FRAME, MAX_VLAN};
use crate::switch::DropReason;
use crate::wire::{MacAddr, eth, ip};

/// Parentheses and negations inside each other.
const MAX_DEPTH: usize = 16;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_ICMP6: u8 = 58;

/// Why a filter cannot be understood, in one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter: {0}")]
pub struct InvalidFilter(String);

type Result<T> = std::result::Result<T, InvalidFilter>;

fn wrong<T>(problem: impl Into<String>) -> Result<T> {
    Err(InvalidFilter(problem.into()))
}

pub(super) fn parse(text: &str) -> Result<Expr> {
    if text.len() > MAX_LENGTH {
        return wrong(format!("longer than {MAX_LENGTH} bytes"));
    }
    let words = words(text);
    let mut parser = Parser { rest: &words, depth: 0 };
    let expr = parser.any()?;
    match parser.rest.first() {
        None => Ok(expr),
        Some(&")") => wrong("a ')' without its '('"),
        Some(word) => wrong(format!("expected 'and' or 'or' before '{word}'")),
    }
}

/// Words, parentheses and exclamation marks.
fn words(text: &str) -> Vec<&str> {
    let is_mark = |c: char| matches!(c, '(' | ')' | '!');
    let mut words = Vec::new();
    for piece in text.split_whitespace().flat_map(|word| word.split_inclusive(is_mark)) {
        // A mark ends its piece.
        let (word, mark) = piece.split_at(piece.trim_end_matches(is_mark).len());
        words.extend([word, mark].into_iter().filter(|word| !word.is_empty()));
    }
    words
}

#[derive(Debug)]
struct Parser<'t> {
    rest: &'t [&'t str],
    depth: usize,
}

impl<'t> Parser<'t> {
    fn peek(&self) -> Option<&'t str> {
        self.rest.first().copied()
    }

    /// Takes the next word if it is one of these.
    fn take(&mut self, wanted: &[&str]) -> Option<&'t str> {
        let (word, rest) = self.rest.split_first().filter(|(word, _)| wanted.contains(word))?;
        self.rest = rest;
        Some(word)
    }

    /// Takes the next word, which has to be there.
    fn word(&mut self, what: &str) -> Result<&'t str> {
        let Some((word, rest)) = self.rest.split_first() else { return wrong(format!("expected {what} at the end")) };
        self.rest = rest;
        Ok(word)
    }

    fn value<T: FromStr>(&mut self, what: &str) -> Result<T> {
        let word = self.word(what)?;
        word.parse().or_else(|_| wrong(format!("expected {what}, not '{word}'")))
    }

    fn number(&mut self, what: &str, last: usize) -> Result<usize> {
        let word = self.word(what)?;
        match word.parse::<usize>() {
            Ok(number) if number <= last => Ok(number),
            _ => wrong(format!("expected {what}, not '{word}'")),
        }
    }

    fn any(&mut self) -> Result<Expr> {
        let mut list = vec![self.all()?];
        while self.take(&["or", "||"]).is_some() {
            list.push(self.all()?);
        }
        Ok(if list.len() == 1 { list.remove(0) } else { Expr::Any(list) })
    }

    fn all(&mut self) -> Result<Expr> {
        let mut list = vec![self.not()?];
        while self.take(&["and", "&&"]).is_some() {
            list.push(self.not()?);
        }
        Ok(if list.len() == 1 { list.remove(0) } else { Expr::All(list) })
    }

    fn not(&mut self) -> Result<Expr> {
        if self.depth == MAX_DEPTH {
            return wrong(format!("more than {MAX_DEPTH} levels of parentheses and negations"));
        }
        self.depth += 1;
        let expr = if self.take(&["not", "!"]).is_some() {
            Expr::Not(Box::new(self.not()?))
        } else if self.take(&["("]).is_some() {
            let expr = self.any()?;
            if self.take(&[")"]).is_none() {
                return wrong("a '(' without its ')'");
            }
            expr
        } else {
            self.primitive()?
        };
        self.depth -= 1;
        Ok(expr)
    }

    fn primitive(&mut self) -> Result<Expr> {
        let what = "a test such as 'host 10.0.0.1', 'tcp port 80', 'vlan 10' or 'arp'";
        let protocol = |number| Expr::Is(Term::Protocol(number));
        let both = |ethertype, number| Expr::All(vec![Expr::Is(Term::EtherType(ethertype)), protocol(number)]);
        let word = self.word(what)?;
        let narrowed = match word {
            "tcp" => Some(protocol(ip::PROTOCOL_TCP)),
            "udp" => Some(protocol(ip::PROTOCOL_UDP)),
            "sctp" => Some(protocol(ip::PROTOCOL_SCTP)),
            "icmp" => Some(both(eth::ETHERTYPE_IPV4, PROTOCOL_ICMP)),
            "icmp6" => Some(both(eth::ETHERTYPE_IPV6, PROTOCOL_ICMP6)),
            "ip" => Some(Expr::Is(Term::EtherType(eth::ETHERTYPE_IPV4))),
            "ip6" => Some(Expr::Is(Term::EtherType(eth::ETHERTYPE_IPV6))),
            "arp" => Some(Expr::Is(Term::EtherType(eth::ETHERTYPE_ARP))),
            _ => None,
        };
        if let Some(protocol) = narrowed {
            // As in `tcp dst port 80`.
            return match self.take(&["src", "dst", "host", "net", "port", "portrange"]) {
                Some(word) => Ok(Expr::All(vec![protocol, self.endpoint(word)?])),
                None => Ok(protocol),
            };
        }
        match word {
            "src" | "dst" | "host" | "net" | "port" | "portrange" => self.endpoint(word),
            "ether" => self.ether().map(Expr::Is),
            _ => self.other(word, what).map(Expr::Is),
        }
    }

    fn other(&mut self, word: &str, what: &str) -> Result<Term> {
        Ok(match word {
            "vlan" => Term::Vlan(match self.peek() {
                Some(word) if word.starts_with(|c: char| c.is_ascii_digit()) => {
                    Some(self.number("a VLAN from 0 to 4094", MAX_VLAN.into())? as u16)
                }
                _ => None,
            }),
            "broadcast" => Term::Broadcast,
            "multicast" => Term::Multicast,
            "less" => Term::Shorter(self.number("a number of bytes", MAX_FRAME)?),
            "greater" => Term::Longer(self.number("a number of bytes", MAX_FRAME)?),
            "dropped" => {
                let reason = DropReason::ALL.iter().find(|reason| self.peek() == Some(reason.name()));
                if reason.is_some() {
                    self.word(what)?;
                }
                Term::Dropped(reason.copied())
            }
            _ if word.parse::<IpAddr>().is_ok() => return wrong(format!("expected 'host' before '{word}'")),
            _ => return wrong(format!("expected {what}, not '{word}'")),
        })
    }

    /// What follows `src`, `dst`, `host`, `net`, `port` or `portrange`.
    fn endpoint(&mut self, word: &str) -> Result<Expr> {
        let side = match word {
            "src" => Side::Source,
            "dst" => Side::Destination,
            _ => Side::Either,
        };
        let kind = match side {
            Side::Either => word,
            // As in `src 10.0.0.1`.
            _ => self.take(&["host", "net", "port", "portrange"]).unwrap_or("host"),
        };
        let term = match kind {
            "net" => Term::Address(side, self.prefix()?),
            "port" => {
                let port = self.number("a port from 0 to 65535", u16::MAX.into())? as u16;
                Term::Ports(side, port, port)
            }
            "portrange" => {
                let (first, last) = self.range()?;
                Term::Ports(side, first, last)
            }
            _ => {
                let address: IpAddr = self.value("an IP address")?;
                Term::Address(side, Prefix { address, bits: if address.is_ipv4() { 32 } else { 128 } })
            }
        };
        Ok(Expr::Is(term))
    }

    fn ether(&mut self) -> Result<Term> {
        let what = "'host', 'src', 'dst', 'proto', 'broadcast' or 'multicast' after 'ether'";
        let word = self.word(what)?;
        let side = match word {
            "broadcast" => return Ok(Term::Broadcast),
            "multicast" => return Ok(Term::Multicast),
            "proto" => return self.ethertype(),
            "src" => Side::Source,
            "dst" => Side::Destination,
            "host" => Side::Either,
            _ => return wrong(format!("expected {what}, not '{word}'")),
        };
        if side != Side::Either {
            self.take(&["host"]);
        }
        Ok(Term::Station(side, self.value::<MacAddr>("an address like 52:54:00:12:34:56")?))
    }

    fn ethertype(&mut self) -> Result<Term> {
        let word = self.word("an EtherType like 0x88b5")?;
        let number = word.strip_prefix("0x").map_or_else(|| word.parse().ok(), |hex| u16::from_str_radix(hex, 16).ok());
        number
            .map(Term::EtherType)
            .map_or_else(|| wrong(format!("expected an EtherType like 0x88b5, not '{word}'")), Ok)
    }

    fn prefix(&mut self) -> Result<Prefix> {
        let word = self.word("a network like 10.0.0.0/8")?;
        let parsed = word.split_once('/').and_then(|(address, bits)| {
            let address: IpAddr = address.parse().ok()?;
            let bits: u32 = bits.parse().ok()?;
            (bits <= if address.is_ipv4() { 32 } else { 128 }).then_some(Prefix { address, bits })
        });
        parsed.map_or_else(|| wrong(format!("expected a network like 10.0.0.0/8, not '{word}'")), Ok)
    }

    fn range(&mut self) -> Result<(u16, u16)> {
        let word = self.word("ports like 6000-6010")?;
        let parsed = word.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
        match parsed {
            Some((first, last)) if first <= last => Ok((first, last)),
            _ => wrong(format!("expected ports like 6000-6010, not '{word}'")),
        }
    }
}
