//! Wireshark as a witness: dumpcap on the wire, tshark to read what it and our captures have written.

use anyhow::{Context, Result, ensure};
use e2e::net::Namespace;
use e2e::process::{Process, run};
use e2e::scratch::Scratch;
use e2e::wait;
use std::path::Path;
use std::time::Duration;

/// What Wireshark says of a checksum that is right (`proto_checksum_vals`), and of one that is wrong, not there, or zero where
/// it must not be. The rest it could not verify: of datagrams that errors quote.
const GOOD: [&str; 1] = ["1"];
const BAD: [&str; 3] = ["0", "3", "4"];
/// Checksums that it checks.
const CHECKSUMS: [&str; 5] = ["ip", "tcp", "udp", "icmp", "icmpv6"];

/// What else is asked of a frame.
const FRAME: [&str; 3] = ["frame.len", "vlan.id", "ipv6.reassembled.length"];
/// Has payload taken for plain bytes: guessing a protocol in random ones can take it minutes.
const NO_PAYLOADS: [&str; 8] = [
    "-d",
    "tcp.port==1-65535,data",
    "-d",
    "udp.port==1-65535,data",
    "-o",
    "tcp.desegment_tcp_streams:FALSE",
    "-o",
    "tcp.analyze_sequence_numbers:FALSE",
];

/// A frame as Wireshark sees it.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    pub(crate) length: usize,
    pub(crate) vlan: Option<u16>,
    /// The last fragment of a datagram by IPv6, with which all of it is judged.
    pub(crate) is_reassembled: bool,
    pub(crate) bad_checksums: Vec<&'static str>,
    pub(crate) good_checksums: Vec<&'static str>,
}

/// Listens to what interfaces receive.
#[derive(Debug)]
pub(crate) struct Ear {
    dumpcap: Process,
    scratch: Scratch,
}

impl Ear {
    pub(crate) fn new(namespace: &Namespace, interfaces: &[&str]) -> Result<Self> {
        let scratch = Scratch::new("ear")?;
        let mut command = namespace.command("dumpcap");
        command.args(["-q", "-w"]).arg(scratch.join("wire.pcapng"));
        for interface in interfaces {
            // What the host itself sends is not yet as it will be on the wire.
            command.args(["-i", interface, "-f", "inbound", "-B", "64"]);
        }
        let mut dumpcap = Process::start("dumpcap", command, &scratch.join("log"), &[])?;
        wait::until_true("dumpcap to listen", Duration::from_secs(10), || {
            dumpcap.check_alive()?;
            Ok(dumpcap.log().contains("File: "))
        })?;
        Ok(Self { dumpcap, scratch })
    }

    /// Every frame heard.
    pub(crate) fn finish(mut self) -> Result<Vec<Heard>> {
        std::thread::sleep(Duration::from_millis(200));
        self.dumpcap.signal(libc::SIGINT);
        self.dumpcap.wait_exit(Duration::from_secs(10))?;
        let mut fields: Vec<_> = FRAME.map(str::to_owned).into();
        fields.extend(CHECKSUMS.iter().map(|name| format!("{name}.checksum.status")));
        let check = ["ip", "tcp", "udp"].map(|name| format!("{name}.check_checksum:TRUE"));
        let options: Vec<&str> = check.iter().flat_map(|option| ["-o", option]).collect();
        let fields: Vec<&str> = fields.iter().map(String::as_str).collect();
        tshark(&self.scratch.join("wire.pcapng"), &options, "", &fields)?.iter().map(|values| heard(values)).collect()
    }
}

fn heard(values: &[String]) -> Result<Heard> {
    let value = |at: usize| values.get(at).map_or("", String::as_str);
    let length = value(0).parse().with_context(|| format!("tshark printed {values:?}"))?;
    let checksums = |verdicts: &[&str]| -> Vec<_> {
        let judged = CHECKSUMS.iter().zip(&values[FRAME.len()..]);
        let such = judged.filter(|(_, status)| status.split(',').any(|status| verdicts.contains(&status)));
        such.map(|(name, _)| *name).collect()
    };
    Ok(Heard {
        length,
        vlan: value(1).parse().ok(),
        is_reassembled: !value(2).is_empty(),
        bad_checksums: checksums(&BAD),
        good_checksums: checksums(&GOOD),
    })
}

/// Direction (1 in, 2 out) and comment of each frame of a capture file for which a display filter holds.
pub(crate) fn direction_and_comment(file: &Path, filter: &str) -> Result<Vec<(String, String)>> {
    let rows = tshark(file, &[], filter, &["frame.packet_flags_direction", "frame.comment"])?;
    // It prints numbers in hexadecimal if it is in the mood.
    let number = |text: &str| text.trim_start_matches("0x").trim_start_matches('0').to_owned();
    Ok(rows.into_iter().map(|row| (number(&row[0]), row[1].clone())).collect())
}

/// Values of fields, frame by frame, of those for which the filter holds.
fn tshark(file: &Path, options: &[&str], filter: &str, fields: &[&str]) -> Result<Vec<Vec<String>>> {
    let file = file.to_string_lossy();
    let mut arguments = vec!["-n", "-r", &file, "-T", "fields", "-E", "separator=|"];
    arguments.extend(NO_PAYLOADS);
    arguments.extend(options);
    if !filter.is_empty() {
        arguments.extend(["-Y", filter]);
    }
    arguments.extend(fields.iter().flat_map(|field| ["-e", field]));
    let text = run("tshark", &arguments)?;
    let rows: Vec<Vec<String>> = text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect();
    ensure!(rows.iter().all(|row| row.len() == fields.len()), "tshark printed {text}");
    Ok(rows)
}
