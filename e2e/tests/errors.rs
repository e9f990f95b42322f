//! What an operator does wrong: one clear line, the right exit code, nothing half-done.

use anyhow::{Context, Result, ensure};
use e2e::machine;
use e2e::process::{Process, output};
use e2e::scratch::Scratch;
use e2e::switch::{Switch, program, sluice};
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::time::Duration;

const USAGE: i32 = 2;
const FAILURE: i32 = 1;

/// Demands the exit code, and one line on standard error that mentions `hint`, with nothing else printed.
fn expect_error(output: &Output, code: i32, hint: &str) -> Result<()> {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(code), "{}, expected {code}; stderr: {err}", output.status);
    ensure!(out.is_empty(), "printed on standard output: {out}");
    ensure!(err.trim_end().lines().count() == 1, "not one line: {err}");
    ensure!(err.to_lowercase().contains(&hint.to_lowercase()), "does not mention {hint}: {err}");
    println!("{}", err.trim_end());
    Ok(())
}

/// `sluice run` with a mistake has to end by itself.
fn run(arguments: &[&str]) -> Result<Output> {
    let scratch = Scratch::new("err")?;
    let control = scratch.join("ctl.sock").display().to_string();
    let state = scratch.join("state").display().to_string();
    let defaults = ["--control", &control, "--state", &state];
    let defaults = defaults.chunks(2).filter(|pair| !arguments.contains(&pair[0])).flatten().copied();
    let all: Vec<&str> = ["run"].into_iter().chain(defaults).chain(arguments.iter().copied()).collect();
    output(Command::new(program()?).args(all), Duration::from_secs(10))
}

/// SPECs that are wrong in themselves, and a word that the message has to have.
fn wrong_specs() -> Vec<(String, &'static str)> {
    let long = format!("/tmp/{}.sock", "x".repeat(100));
    [
        ("vm1", "vm1"),
        ("vm1=/tmp/a.sock", "form"),
        ("=vhost-user:/tmp/a.sock", "name"),
        ("vm 1=vhost-user:/tmp/a.sock", "name"),
        ("vm1=vhost-user:", "path"),
        ("vm1=vhost-user:/tmp/", "folder"),
        ("vm1=ipvlan:eth0", "ipvlan"),
        ("vm1=vhost-user:/tmp/a.sock,colour=red", "colour"),
        ("vm1=vhost-user:/tmp/a.sock,vlan", "vlan"),
        ("vm1=vhost-user:/tmp/a.sock,vlan=4095", "vlan"),
        ("vm1=vhost-user:/tmp/a.sock,vlan=1,vlan=2", "vlan"),
        ("vm1=vhost-user:/tmp/a.sock,trunk=20-10", "trunk"),
        ("vm1=vhost-user:/tmp/a.sock,queues=0", "queues"),
        ("vm1=vhost-user:/tmp/a.sock,queues=100000", "queues"),
        ("vm1=vhost-user:/tmp/a.sock,mtu=10", "mtu"),
        ("vm1=vhost-user:/tmp/a.sock,mac=02:00", "mac"),
        ("vm1=vhost-user:/tmp/a.sock,mac=ff:ff:ff:ff:ff:ff", "mac"),
        ("vm1=vhost-user:/tmp/a.sock,spoofcheck=on", "mac"),
        ("vm1=vhost-user:/tmp/a.sock,mode=both", "mode"),
        ("vm1=tap:a-name-that-is-too-long", "interface"),
    ]
    .map(|(spec, hint)| (spec.to_owned(), hint))
    .into_iter()
    .chain([(format!("vm1=vhost-user:{long}"), "107")])
    .collect()
}

#[test]
fn wrong_specs_are_usage_errors_of_run() -> Result<()> {
    for (spec, hint) in wrong_specs() {
        expect_error(&run(&["--port", &spec])?, USAGE, hint).with_context(|| spec)?;
    }
    let twice = ["--port", "vm1=vhost-user:/tmp/a.sock", "--port", "vm1=vhost-user:/tmp/b.sock"];
    expect_error(&run(&twice)?, USAGE, "vm1")
}

#[test]
fn wrong_specs_add_nothing_to_a_running_switch() -> Result<()> {
    let _turn = machine::exclusive()?;
    let switch = Switch::start(&[])?;
    let scratch = Scratch::new("ports")?;
    let spec = format!("good=vhost-user:{}", scratch.join("good.sock").display());
    switch.add_port(&spec)?;
    let before = switch.json(&["port", "list"])?;
    for (spec, hint) in wrong_specs() {
        expect_error(&switch.command(&["port", "add", &spec])?, USAGE, hint).with_context(|| spec)?;
    }
    expect_error(&switch.command(&["port", "add", &spec])?, FAILURE, "good")?;
    let again = format!("other=vhost-user:{}", scratch.join("good.sock").display());
    expect_error(&switch.command(&["port", "add", &again])?, FAILURE, "good.sock")?;
    let nowhere = format!("vm1=vhost-user:{}", scratch.join("missing/a.sock").display());
    expect_error(&switch.command(&["port", "add", &nowhere])?, FAILURE, "missing")?;
    let nowhere = format!("vm1=vhost-user:{},mode=server", scratch.join("missing/a.sock").display());
    expect_error(&switch.command(&["port", "add", &nowhere])?, FAILURE, "missing")?;
    expect_error(&switch.command(&["port", "del", "nobody"])?, FAILURE, "nobody")?;
    expect_error(&switch.command(&["port", "show", "nobody"])?, FAILURE, "nobody")?;
    let after = switch.json(&["port", "list"])?;
    let names = |list: &serde_json::Value| {
        list.as_array().map(|ports| ports.iter().map(|p| p["name"].clone()).collect::<Vec<_>>())
    };
    ensure!(names(&before) == names(&after) && names(&after).is_some_and(|n| n.len() == 1), "{after}");
    Ok(())
}

#[test]
fn a_wrong_file_is_told_with_its_place() -> Result<()> {
    let scratch = Scratch::new("conf")?;
    let file = scratch.join("sluice.toml");
    let path = file.display().to_string();
    for (text, hint) in [
        ("[[port]]\nname = \"vm1\"\nkind = \"vhost-user\"\ntarget = \"/tmp/a.sock\"\ncolour = \"red\"\n", "colour"),
        ("[controls]\n", "controls"),
        ("[[port]]\nname = \"vm1\"\nkind = \"vhost-user\"\ntarget = \"/tmp/a.sock\"\nvlan = 5000\n", "vlan"),
        ("[[port]\n", "sluice.toml"),
    ] {
        fs::write(&file, text)?;
        let output = run(&["--config", &path])?;
        expect_error(&output, USAGE, hint).with_context(|| text.to_owned())?;
        let line = text.trim_end().lines().count();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            message.contains(&format!(":{line}")) || message.contains(&format!("line {line}")),
            "no line {line}: {message}"
        );
    }
    expect_error(&run(&["--config", "/nonexistent/sluice.toml"])?, FAILURE, "/nonexistent/sluice.toml")
}

#[test]
fn paths_that_cannot_be_used_are_failures() -> Result<()> {
    expect_error(&run(&["--control", "/nonexistent/ctl.sock"])?, FAILURE, "/nonexistent")?;
    expect_error(&run(&["--state", "/proc/sluice"])?, FAILURE, "/proc/sluice")?;
    let long = format!("/tmp/{}.sock", "x".repeat(100));
    expect_error(&run(&["--control", &long])?, USAGE, "107")?;
    expect_error(&sluice(&["status", "--socket", "/nonexistent/ctl.sock"])?, FAILURE, "/nonexistent/ctl.sock")?;
    expect_error(&run(&["--cpu", "9999"])?, USAGE, "9999")?;
    expect_error(&run(&["--cpu", "1000"])?, FAILURE, "1000")
}

#[test]
fn a_control_socket_in_use_is_left_to_its_owner() -> Result<()> {
    let _turn = machine::exclusive()?;
    let switch = Switch::start(&[])?;
    let control = switch.control().display().to_string();
    expect_error(&run(&["--control", &control])?, FAILURE, &control)?;
    switch.json(&["status"]).map(drop)
}

/// Also after a crash, whose socket is still there, a switch starts.
#[test]
fn a_control_socket_that_nobody_serves_is_taken_over() -> Result<()> {
    let _turn = machine::exclusive()?;
    let mut switch = Switch::start(&[])?;
    switch.restart(true, &[])?;
    switch.json(&["status"]).map(drop)
}

#[test]
fn strangers_are_refused() -> Result<()> {
    const NOBODY: u32 = 65_534;
    let _turn = machine::exclusive()?;
    let switch = Switch::start(&[])?;
    let scratch = Scratch::new("bin")?;
    // Where the build is, nobody may go.
    let copy = scratch.join("sluice");
    fs::copy(program()?, &copy)?;
    let mut command = Command::new(copy);
    command.args(["port", "list", "--socket", &switch.control().to_string_lossy()]);
    let output = command.uid(NOBODY).gid(NOBODY).output()?;
    expect_error(&output, FAILURE, "permission")
}

#[test]
fn the_switch_ends_well_upon_sigterm_and_sigint() -> Result<()> {
    let _turn = machine::exclusive()?;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let scratch = Scratch::new("end")?;
        let control = scratch.join("ctl.sock");
        let mut command = Command::new(program()?);
        command.arg("run").arg("--control").arg(&control).arg("--state").arg(scratch.join("state"));
        let mut process = Process::start("sluice", command, &scratch.join("log"), &[])?;
        e2e::wait::until_true("the control socket", Duration::from_secs(10), || {
            process.check_alive()?;
            Ok(control.exists())
        })?;
        process.signal(signal);
        let status = process.wait_exit(Duration::from_secs(5))?;
        ensure!(status.success(), "{status} upon signal {signal}:\n{}", process.log_tail());
        ensure!(!control.exists(), "the control socket is left");
    }
    Ok(())
}
