//! QEMU guests with vhost-user network devices.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::agent::Agent;
use crate::machine::Cpus;
use crate::process::{Process, tail};
use crate::scratch::Scratch;
use crate::{image, machine, wait};

/// Port of the echo service that every guest runs.
pub const ECHO_PORT: u16 = 7007;
/// A guest is up well before that, also when two boot on one CPU without KVM.
pub const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// Short commands in a guest.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// A network device of a guest.
#[derive(Debug, Clone)]
pub struct Nic {
    socket: PathBuf,
    mac: String,
    connects: bool,
    queues: u16,
    properties: Vec<String>,
}

impl Nic {
    /// A device for which QEMU listens on `socket`.
    pub fn new(socket: &Path, mac: &str) -> Self {
        Self { socket: socket.to_owned(), mac: mac.to_owned(), connects: false, queues: 1, properties: Vec::new() }
    }

    /// QEMU connects to a switch that listens.
    pub fn connects(mut self) -> Self {
        self.connects = true;
        self
    }

    /// Number of queue pairs.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// Further device properties, such as `mrg_rxbuf=off` or `host_mtu=9000`; or none.
    pub fn with(mut self, properties: &str) -> Self {
        if !properties.is_empty() {
            self.properties.push(properties.to_owned());
        }
        self
    }

    fn arguments(&self, index: usize) -> Vec<String> {
        let role = if self.connects { "reconnect-ms=100" } else { "server=on,wait=off" };
        let mut device = format!("virtio-net-pci,netdev=net{index},mac={},romfile=", self.mac);
        if self.queues > 1 {
            device.push_str(&format!(",mq=on,vectors={}", 2 * u32::from(self.queues) + 2));
        }
        for properties in &self.properties {
            device.push_str(&format!(",{properties}"));
        }
        vec![
            "-chardev".to_owned(),
            format!("socket,id=char{index},path={},{role}", self.socket.display()),
            "-netdev".to_owned(),
            format!("vhost-user,id=net{index},chardev=char{index},queues={}", self.queues),
            "-device".to_owned(),
            device,
        ]
    }
}

/// What a guest is to be like.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    name: String,
    memory_mib: u32,
    smp: u32,
    nics: Vec<Nic>,
    cpus: Option<Vec<usize>>,
    accelerator: Option<String>,
    incoming: bool,
}

impl GuestSpec {
    /// A small guest without a network.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: 192,
            smp: 1,
            nics: Vec::new(),
            cpus: None,
            accelerator: None,
            incoming: false,
        }
    }

    /// Adds a network device; the first is `eth0` inside.
    pub fn nic(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    /// Number of virtual CPUs.
    pub fn smp(mut self, smp: u32) -> Self {
        self.smp = smp;
        self
    }

    /// Size of the memory.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// CPUs to run on, instead of those for load.
    pub fn cpus(mut self, cpus: &[usize]) -> Self {
        self.cpus = Some(cpus.to_vec());
        self
    }

    /// `kvm` or `tcg`, instead of what works best.
    pub fn accelerator(mut self, accelerator: &str) -> Self {
        self.accelerator = Some(accelerator.to_owned());
        self
    }

    /// Does not boot, but waits for a guest to migrate here.
    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    fn chosen_cpus(&self) -> Result<Vec<usize>> {
        match &self.cpus {
            Some(cpus) => Ok(cpus.clone()),
            None => Ok(machine::cpus()?.load),
        }
    }

    /// Starts QEMU. It waits for its switch before it boots, so [`Guest::wait_ready`] is a second step.
    pub fn start(self) -> Result<Guest> {
        let scratch = Scratch::new(&self.name)?;
        let cpus = self.chosen_cpus()?;
        let command = self.command(&scratch)?;
        let process = Process::start(&self.name, command, &scratch.join("qemu.log"), &cpus)?;
        Ok(Guest { spec: self, process, agent: Mutex::new(None), scratch })
    }

    fn command(&self, scratch: &Scratch) -> Result<Command> {
        let accelerator = match &self.accelerator {
            Some(accelerator) => accelerator.clone(),
            None => machine::accelerator()?,
        };
        let image = image::ensure()?;
        let size = self.memory_mib;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-name", &self.name]);
        command.args(["-cpu", processor(&accelerator)]);
        command.args(["-machine", "q35,memory-backend=mem,smbus=off,vmport=off", "-accel", &accelerator]);
        command.args([
            "-object",
            &format!("memory-backend-memfd,id=mem,size={size}M,share=on"),
            "-m",
            &format!("{size}M"),
        ]);
        command.args(["-smp", &self.smp.to_string()]);
        command.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initramfs);
        command.args([
            "-append",
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on cryptomgr.notests",
        ]);
        let listen =
            |id: &str, file: &str| format!("socket,id={id},path={},server=on,wait=off", scratch.join(file).display());
        let console =
            format!("{},logfile={}", listen("console", "console.sock"), scratch.join("console.log").display());
        command.args(["-chardev", &console, "-serial", "chardev:console"]);
        command.args(["-chardev", &listen("qmp", "qmp.sock"), "-mon", "chardev=qmp,mode=control"]);
        command.args(["-device", "virtio-serial-pci", "-chardev", &listen("agent", "agent.sock")]);
        command.args(["-device", "virtserialport,chardev=agent,name=agent"]);
        for (index, nic) in self.nics.iter().enumerate() {
            command.args(nic.arguments(index));
        }
        if self.incoming {
            command.args(["-incoming", "defer"]);
        }
        Ok(command)
    }
}

/// The processor that a guest sees. An emulated one carries `rep movsb` out byte by byte, which a kernel that is told that this
/// is fast spends most of its time with: such a guest copies words instead, and copies cost about what they cost elsewhere.
fn processor(accelerator: &str) -> &'static str {
    if accelerator.starts_with("tcg") { "max,-erms,-fsrm" } else { "max" }
}

/// A running guest; ended at drop.
#[derive(Debug)]
pub struct Guest {
    spec: GuestSpec,
    process: Process,
    agent: Mutex<Option<Agent>>,
    scratch: Scratch,
}

impl Guest {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// QEMU's process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The socket of its serial console, for people.
    pub fn console_socket(&self) -> PathBuf {
        self.scratch.join("console.sock")
    }

    /// MAC address of its first device.
    pub fn mac(&self) -> &str {
        self.spec.nics.first().map_or("", |nic| &nic.mac)
    }

    /// Has the guest use the switch's CPU too, or not any more.
    pub fn spread(&self, over_all: bool) -> Result<()> {
        let Cpus { switch, load } = machine::cpus()?;
        let cpus = if over_all { [switch, load].concat() } else { self.spec.chosen_cpus()? };
        self.process.set_cpus(&cpus)
    }

    /// Waits until the guest's agent has announced itself; also after a reboot.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let what = format!("{} to boot", self.spec.name);
        let socket = self.scratch.join("agent.sock");
        let Self { process, agent, .. } = self;
        let slot = agent.get_mut().unwrap_or_else(PoisonError::into_inner);
        let booted = wait::until_true(&what, limit, || {
            process.check_alive()?;
            match slot {
                Some(agent) => agent.poll_hello(),
                None => {
                    *slot = Agent::connect(&socket).ok();
                    Ok(false)
                }
            }
        });
        booted.map_err(|e| e.context(self.diagnosis()))?;
        self.call(&json!({"op": "echo_serve", "port": ECHO_PORT}))?;
        Ok(())
    }

    /// What helps to see why a guest did not do what it should.
    pub fn diagnosis(&self) -> String {
        let console = tail(&self.scratch.join("console.log"));
        format!("--- {} QEMU:\n{}\n--- console:\n{console}", self.spec.name, self.process.log_tail())
    }

    fn agent(&self) -> MutexGuard<'_, Option<Agent>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request to the guest's agent and gives the answer.
    pub fn call(&self, request: &Value) -> Result<Value> {
        self.call_for(request, COMMAND_LIMIT)
    }

    /// [`Guest::call`] for work that takes longer.
    pub fn call_for(&self, request: &Value, limit: Duration) -> Result<Value> {
        let mut agent = self.agent();
        let agent = agent.as_mut().context("the guest is not up")?;
        agent.call(request, limit).with_context(|| format!("in {}", self.spec.name))
    }

    /// Sends a request whose answer [`Guest::finish`] collects.
    pub fn begin(&self, request: &Value) -> Result<()> {
        self.agent().as_mut().context("the guest is not up")?.send(request)
    }

    /// Waits for the answer to a request that [`Guest::begin`] sent.
    pub fn finish(&self, request: &Value, limit: Duration) -> Result<Value> {
        let mut agent = self.agent();
        let agent = agent.as_mut().context("the guest is not up")?;
        agent.receive(request, limit).with_context(|| format!("in {}", self.spec.name))
    }

    /// Runs a shell command in the guest and gives what it printed; an error if it fails.
    pub fn run(&self, command: &str) -> Result<String> {
        self.run_for(command, COMMAND_LIMIT)
    }

    /// [`Guest::run`] for commands that take longer.
    pub fn run_for(&self, command: &str, limit: Duration) -> Result<String> {
        let mut agent = self.agent();
        let agent = agent.as_mut().context("the guest is not up")?;
        match agent.run(command, limit)? {
            (0, output) => Ok(output),
            (code, output) => bail!("in {}: `{command}` ended with {code}: {}", self.spec.name, output.trim()),
        }
    }

    /// Gives a device an address and switches it on.
    pub fn set_address(&self, dev: &str, address: &str) -> Result<()> {
        self.run(&format!("ip link set {dev} up; ip addr add {address} dev {dev}")).map(drop)
    }

    /// Executes a QMP command such as `stop`, `cont` or `system_reset`.
    pub fn qmp(&self, command: &str) -> Result<Value> {
        Qmp::connect(&self.scratch.join("qmp.sock"))?.execute(command)
    }

    /// [`Guest::qmp`] for commands with arguments.
    pub fn qmp_with(&self, command: &str, arguments: &Value) -> Result<Value> {
        Qmp::connect(&self.scratch.join("qmp.sock"))?.execute_with(command, arguments)
    }

    /// Begins to migrate to a guest that was started as [`GuestSpec::incoming`], at `rate` bytes a second at most.
    pub fn begin_migration(&self, target: &Guest, rate: u64) -> Result<()> {
        let uri = format!("unix:{}", target.scratch.join("migration.sock").display());
        let socket = target.scratch.join("qmp.sock");
        let mut qmp = wait::until("the target's QEMU", COMMAND_LIMIT, || Ok(Qmp::connect(&socket).ok()))?;
        qmp.execute_with("migrate-incoming", &json!({"uri": uri}))?;
        self.limit_migration(rate)?;
        self.qmp_with("migrate", &json!({"uri": uri})).map(drop)
    }

    /// Bounds the bytes a second of a migration, and the time for which the guest stands still in its end.
    pub fn limit_migration(&self, rate: u64) -> Result<()> {
        let limits = json!({"max-bandwidth": rate, "downtime-limit": 10});
        self.qmp_with("migrate-set-parameters", &limits).map(drop)
    }

    /// Waits until the migration has ended in one of these states, and gives QEMU's report.
    pub fn wait_migration(&self, ends: &[&str], limit: Duration) -> Result<Value> {
        wait::until("the migration to end", limit, || {
            let report = self.qmp("query-migrate")?;
            match report["status"].as_str() {
                Some(status) if ends.contains(&status) => Ok(Some(report)),
                Some("failed") => bail!("the migration failed: {report}"),
                _ => Ok(None),
            }
        })
    }

    /// Takes over the agent of the guest that has migrated here.
    pub fn adopt(&mut self) -> Result<()> {
        let socket = self.scratch.join("agent.sock");
        *self.agent.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(Agent::connect(&socket)?);
        Ok(())
    }

    /// Ends QEMU and starts it again, to wait for a guest to migrate here.
    pub fn respawn_incoming(&mut self) -> Result<()> {
        self.process.kill();
        *self = self.spec.clone().incoming().start()?;
        Ok(())
    }

    /// Kills QEMU as a crash would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts the same guest again.
    pub fn respawn(&mut self) -> Result<()> {
        self.process.kill();
        *self = self.spec.clone().start()?;
        Ok(())
    }
}

/// A small client of QEMU's machine protocol.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(COMMAND_LIMIT))?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.read().context("no greeting from QEMU")?;
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("QEMU said: {line}"))
    }

    fn execute(&mut self, command: &str) -> Result<Value> {
        self.execute_with(command, &json!({}))
    }

    /// Events in between are of no interest here.
    fn execute_with(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.0.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if answer["error"].is_object() {
                bail!("QEMU refuses {command}: {}", answer["error"]["desc"]);
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }
}
