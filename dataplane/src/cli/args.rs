//! What can be typed.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use sluice::capture::filter::Filter;
use sluice::config::{PortConfig, PortQueue, PortText, WorkerMode, parse_cpu, parse_switch, parse_worker};
use sluice::sandbox::SandboxMode;

/// Where the control socket is unless said otherwise.
pub(crate) const DEFAULT_CONTROL: &str = "/run/sluice/control.sock";
/// Where the ports are kept unless said otherwise.
pub(crate) const DEFAULT_STATE: &str = "/var/lib/sluice";

const SPEC_HELP: &str = "\
A port is written NAME=KIND:TARGET[,key=value]..., for example

  vm1=vhost-user:/run/vm1.sock                     connects to the socket QEMU listens on, as soon as it is there
  vm2=vhost-user:/run/vm2.sock,mode=server,mtu=9000
  host=tap:sluice0,network=blue,trunk=10,20-29
  up=afxdp:eth1                                    takes the interface over as an uplink
  up=afxdp:eth1,networks=blue:100,red:200          one for two networks, each with its VLAN
  up=dpdk:net_tap0,iface=up0                       a device of DPDK's with its arguments, if built in

Keys:
  mode=client|server   who listens on the vhost-user socket: the VM (client, the default) or the switch
  mode=auto|zerocopy|copy|skb
                       how an afxdp port gets at frames; auto takes the fastest that works
  network=NAME         bridge domain, 'default' unless given
  vlan=1..4094         access VLAN; with trunk, the VLAN of untagged frames
  trunk=10,20-29       tagged VLANs that pass
  networks=blue:100,red
                       carries whole networks, each as a VLAN or one untagged, in place of network, vlan and trunk
  mtu=68..65535        largest layer-3 packet
  queues=1..256        queue pairs at most (a tap has one)
  mac=ADDRESS          the station's address
  spoofcheck=on|off    drop frames from other addresses than mac
  replace=on|off       afxdp: take the place of an XDP program that the interface has
  busy-poll=on|off     afxdp: let the workers poll the driver
  tx-checksum=on|off   afxdp: leave checksums to the driver, or the kernel (default: if the driver can)
  rate-rx=500M         bits per second taken from the port at most, with K, M or G (burst-rx=10M: at once, in bits)
  rate-tx=500M         bits per second sent to the port at most (burst-tx=10M)
  owner=TEXT           whose port it is, for who manages ports by program

A relative path is taken from the current folder.";

/// A userspace vhost-user switch for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Control socket of the switch
    #[arg(long, global = true, env = "SLUICE_SOCKET", value_name = "PATH", default_value = DEFAULT_CONTROL)]
    pub(crate) socket: PathBuf,
    /// Print JSON ('run' logs JSON)
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the switch
    Run(RunArgs),
    /// Keep the connections of a switch while it is gone. 'run' starts one by itself; this is for where processes go with it,
    /// as in a container
    Keep(KeepArgs),
    /// Add, remove and show ports
    #[command(subcommand)]
    Port(PortCommand),
    /// Show and flush the forwarding table
    #[command(subcommand)]
    Fdb(FdbCommand),
    /// Show workers and their load, and pin queues to them
    #[command(subcommand)]
    Worker(WorkerCommand),
    /// Show counters, once or as rates
    Stats(StatsArgs),
    /// Show the switch and its workers
    Status,
    /// Write a port's frames to a file while they pass, until interrupted
    Capture(CaptureArgs),
    /// Show frames while they pass, a line for each, until interrupted. A busy port loses frames to it rather than slow
    /// down; a filter is the means against that
    Trace(TraceArgs),
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
#[command(after_long_help = SPEC_HELP)]
pub(crate) struct RunArgs {
    /// Take over from the switch that runs at the control socket, without its guests noticing; if there is none, just run
    #[arg(long)]
    pub(crate) takeover: bool,
    /// Configuration file (TOML); what is given here beats it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Add this port, and keep it for later runs (repeatable)
    #[arg(long = "port", value_name = "SPEC", value_parser = parse_spec)]
    pub(crate) ports: Vec<PortConfig>,
    /// One worker on each of these CPUs [default: one, on any CPU]
    #[arg(long = "cpu", value_name = "N[,N]", value_delimiter = ',', value_parser = parse_cpu)]
    pub(crate) cpus: Vec<usize>,
    /// How workers wait: adaptive, poll or interrupt [default: adaptive]
    #[arg(long)]
    pub(crate) mode: Option<WorkerMode>,
    /// Move queues from busy workers to idle ones [default: on]
    #[arg(long, value_name = "on|off", value_parser = |text: &str| parse_switch("rebalance", text))]
    pub(crate) rebalance: Option<bool>,
    /// Control socket; --socket is another name for it [default: /run/sluice/control.sock]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Folder that all vhost-user sockets have to be in; no link in it is followed [default: they can be anywhere]
    #[arg(long, value_name = "DIR")]
    pub(crate) socket_root: Option<PathBuf>,
    /// How much the process gives up once it has started: auto (what the kernel can do), strict (no start unless
    /// capabilities, landlock, as far as the kernel has it, and seccomp hold) or off [default: auto]
    #[arg(long, value_name = "MODE")]
    pub(crate) sandbox: Option<SandboxMode>,
    /// Where to keep the ports [default: /var/lib/sluice]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Have another process keep connections to guests should this one crash [default: on]
    #[arg(long, value_name = "on|off", value_parser = |text: &str| parse_switch("keeper", text))]
    pub(crate) keeper: Option<bool>,
    /// Serve /metrics, /healthz and /readyz here, like 127.0.0.1:9090 [default: not]
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Form of the log on standard error
    #[arg(long, value_enum, default_value_t = LogForm::Text)]
    pub(crate) log: LogForm,
    /// Log more; twice for all. SLUICE_LOG has the last word, like SLUICE_LOG=sluice=debug
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Args)]
pub(crate) struct KeepArgs {
    /// State directory of the switch
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub(crate) state: PathBuf,
    /// Listen on standard input, and end with the switch
    #[arg(long, hide = true)]
    pub(crate) inherited: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogForm {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PortCommand {
    /// Add a port; it connects in the background
    #[command(after_long_help = SPEC_HELP)]
    Add {
        /// NAME=KIND:TARGET[,key=value]...
        #[arg(value_parser = parse_spec)]
        spec: PortConfig,
    },
    /// Remove a port
    Del {
        name: String,
        /// Only if it belongs to this owner
        #[arg(long)]
        owner: Option<String>,
    },
    /// List all ports
    List,
    /// Show all about one port
    Show { name: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum FdbCommand {
    /// Show the addresses the switch knows
    Show {
        /// Of this network only
        #[arg(long)]
        network: Option<String>,
    },
    /// Forget learned addresses
    Flush {
        /// Of this network only
        #[arg(long)]
        network: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum WorkerCommand {
    /// List the workers, and the queues they serve with their load
    List,
    /// Have a worker serve a queue, or all queues of a port, whatever the load; for later runs, too
    Pin {
        #[arg(value_name = "PORT[:QUEUE]")]
        queue: PortQueue,
        #[arg(value_parser = parse_worker)]
        worker: usize,
    },
    /// Let load decide again
    Unpin {
        #[arg(value_name = "PORT[:QUEUE]")]
        queue: PortQueue,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Show where the workers' time goes: cycles per frame by stage and port, sizes of bursts, copies
    #[arg(long)]
    pub(crate) cycles: bool,
    /// Show rates, again and again
    #[arg(long)]
    pub(crate) watch: bool,
    /// Seconds between two of them, 0.1 to 3600
    #[arg(long, value_name = "S", default_value = "1", requires = "watch", value_parser = parse_interval)]
    pub(crate) interval: u32,
}

const FILTER_HELP: &str = "\
A filter is one or more of these, joined by and, or, not and parentheses:

  [src|dst] host ADDRESS      [src|dst] net PREFIX/LENGTH      of IPv4, IPv6 and ARP
  [tcp|udp] [src|dst] port N  [tcp|udp] [src|dst] portrange N-M
  ether [src|dst|host] MAC    ether proto 0xNNNN    broadcast    multicast
  ip  ip6  arp  icmp  icmp6  tcp  udp  sctp         vlan [N]
  less BYTES  greater BYTES                         dropped [REASON]

for example

  sluice capture up --write - --filter 'vlan 10 and (arp or icmp)' | tshark -i -
  sluice capture vm1 --write x.pcapng --filter 'dropped full or tcp port 80' --snaplen 128";

#[derive(Debug, Args)]
#[command(after_long_help = FILTER_HELP)]
pub(crate) struct CaptureArgs {
    /// The port
    pub(crate) name: String,
    /// File to write (pcapng); '-' for standard output
    #[arg(long, value_name = "FILE")]
    pub(crate) write: PathBuf,
    /// Bytes to keep of each frame; 0 for all
    #[arg(long, visible_alias = "snaplen", value_name = "BYTES", default_value_t = 0)]
    pub(crate) snap_length: u32,
    /// Only frames from the port (rx), or to it (tx)
    #[arg(long, value_enum)]
    pub(crate) direction: Option<CaptureDirection>,
    /// Only frames for which this holds, like 'host 10.0.0.1 and tcp port 80'
    #[arg(long, value_name = "EXPR")]
    pub(crate) filter: Option<Filter>,
    /// End after so many frames
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
}

#[derive(Debug, Args)]
#[command(after_long_help = FILTER_HELP)]
pub(crate) struct TraceArgs {
    /// The ports; all that there are unless given
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Only frames for which this holds, like 'host 10.0.0.1 and tcp port 80'
    #[arg(long, value_name = "EXPR")]
    pub(crate) filter: Option<Filter>,
    /// Only frames from the port (rx), or to it (tx)
    #[arg(long, value_enum)]
    pub(crate) direction: Option<CaptureDirection>,
    /// Only frames that were dropped
    #[arg(long)]
    pub(crate) drops: bool,
    /// End after so many frames
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CaptureDirection {
    Rx,
    Tx,
}

/// A SPEC, with its path made absolute from the current folder.
fn parse_spec(spec: &str) -> Result<PortConfig, String> {
    let text = PortText::from_spec(spec).map_err(|error| error.to_string())?;
    let text = match std::env::current_dir() {
        Ok(folder) => text.relative_to(&folder),
        // It can have been removed; then only absolute paths will do.
        Err(_) => text,
    };
    text.parse().map_err(|error| error.to_string())
}

/// Seconds as milliseconds.
fn parse_interval(text: &str) -> Result<u32, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok((seconds * 1000.0).round() as u32),
        _ => Err("the interval must be 0.1 to 3600 seconds".into()),
    }
}
