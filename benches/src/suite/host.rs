//! What machine this is, in words that tell whether figures can be compared.

use std::fs;
use std::process::Command;

/// Name and value of all that matters.
pub fn describe() -> Vec<(String, String)> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = |label: &str| field(&cpuinfo, label).unwrap_or_else(|| "unknown".to_owned());
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let model = format!("{} (family {}, model {})", cpu("model name"), cpu("cpu family"), cpu("model"));
    let mut all = vec![
        ("date", said("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        ("commit", said("git", &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"])),
        ("CPU", format!("{count} × {model}, {} MHz", cpu("cpu MHz"))),
        ("caches", caches()),
        ("virtual machine", if cpu("flags").contains("hypervisor") { "yes" } else { "no" }.to_owned()),
        ("memory", field(&memory, "MemTotal").unwrap_or_default()),
        ("kernel", said("uname", &["-sr"])),
        ("huge pages of 2 MiB", field(&memory, "HugePages_Total").unwrap_or_default()),
        ("OVS-DPDK", said("ovs-vsctl", &["--version"])),
        ("DPDK", said("dpkg-query", &["-W", "-f", "${Version}", "dpdk"])),
        ("QEMU", said("qemu-system-x86_64", &["--version"])),
    ];
    all.retain(|(_, value)| !value.is_empty());
    all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The value behind a label in a file of lines such as `label : value`.
fn field(text: &str, label: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(name, _)| name.trim() == label).map(|(_, value)| value.trim().to_owned())
}

/// The first line that a program prints; empty if it cannot be run.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// The caches of the first CPU, such as `L1 32K, L2 512K, L3 32768K`.
fn caches() -> String {
    let read = |index: usize, what: &str| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{what}");
        fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    };
    let levels = (0..8).filter_map(|index| {
        (read(index, "type")? != "Instruction").then_some(())?;
        Some(format!("L{} {}", read(index, "level")?, read(index, "size")?))
    });
    levels.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn fields_are_found_by_their_labels() {
        let text = "processor\t: 0\nmodel\t\t: 1\nmodel name\t: EPYC 7\n";
        assert_eq!(super::field(text, "model name").as_deref(), Some("EPYC 7"));
        assert_eq!(super::field(text, "model").as_deref(), Some("1"));
        assert_eq!(super::field(text, "flags"), None);
        assert!(super::describe().iter().any(|(name, _)| name == "kernel"));
    }
}
