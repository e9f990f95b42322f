//! The command line.

use std::path::Path;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches};

mod args;
mod capture;
mod client;
mod cycles;
mod describe;
mod fdb;
mod keep;
mod live;
mod output;
mod pcapng;
mod port;
mod run;
mod stats;
mod status;
mod trace;
mod worker;

use args::{Cli, Command, RunArgs};

/// Why a command did not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It was asked for in a wrong way.
    Usage(String),
    /// It could not be done.
    Failed(String),
    /// Nobody reads our output any more, as with `| head`.
    OutputClosed,
}

impl Failure {
    pub(crate) fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }

    /// Tells the operator, in exactly one line.
    pub(crate) fn report(&self) -> ExitCode {
        let (code, message) = match self {
            Self::Usage(message) => (ExitCode::from(2), message),
            Self::Failed(message) => (ExitCode::from(1), message),
            Self::OutputClosed => return ExitCode::SUCCESS,
        };
        eprintln!("sluice: {}", one_line(message));
        code
    }
}

/// The same with line breaks as spaces, and without characters that would upset a terminal.
fn one_line(message: &str) -> String {
    let words: Vec<_> = message.split_whitespace().collect();
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    words.join(" ").chars().map(printable).collect()
}

/// Understands the arguments and runs the command.
pub(crate) fn main() -> Result<(), Failure> {
    // Lossy is good enough for what this is for: the name of the command in a complaint.
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => return output::emit(&error.to_string()),
        Err(error) => return Err(Failure::Usage(explain(&error, words))),
    };
    let (socket, json) = (cli.socket.as_path(), cli.json);
    match cli.command {
        Command::Run(args) => run::run(args, json),
        Command::Keep(args) => keep::run(&args),
        Command::Port(command) => port::run(command, socket, json),
        Command::Fdb(command) => fdb::run(command, socket, json),
        Command::Worker(command) => worker::run(command, socket, json),
        Command::Stats(args) => stats::run(&args, socket, json),
        Command::Status => status::run(socket, json),
        Command::Capture(args) => capture::run(&args, socket, json),
        Command::Trace(args) => trace::run(&args, socket, json),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command(), "sluice", &mut script);
            output::emit(&String::from_utf8_lossy(&script))
        }
    }
}

/// All that can be typed.
fn command() -> clap::Command {
    Cli::command()
}

fn parse() -> Result<Cli, clap::Error> {
    let matches = command().try_get_matches()?;
    let mut cli = Cli::from_arg_matches(&matches)?;
    if let (Command::Run(run), Some(given)) = (&mut cli.command, matches.subcommand_matches("run")) {
        name_socket(run, &cli.socket, given.value_source("socket"))?;
    }
    Ok(cli)
}

/// Has the switch make its socket where `--socket` says, which is another name for `--control` there. SLUICE_SOCKET
/// gives way to `--control`, since it is set for a whole session.
fn name_socket(run: &mut RunArgs, socket: &Path, source: Option<ValueSource>) -> Result<(), clap::Error> {
    match (source, &run.control) {
        (Some(ValueSource::CommandLine), Some(control)) if control != socket => {
            let problem = "'--control' and '--socket' are two names for the same and differ; give one of them";
            Err(command().error(ErrorKind::ArgumentConflict, problem))
        }
        (Some(ValueSource::CommandLine | ValueSource::EnvVariable), None) => {
            run.control = Some(socket.into());
            Ok(())
        }
        _ => Ok(()),
    }
}

/// What the parser has to say, in one line, with the help to look at.
fn explain(error: &clap::Error, arguments: impl Iterator<Item = String>) -> String {
    let rendered = error.to_string();
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let problem = match (error.kind(), context(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(argument)) if argument == "--control" => {
            "'--control' is for 'sluice run'; the other commands take '--socket'".into()
        }
        (ErrorKind::UnknownArgument, Some(argument)) => format!("unknown argument '{argument}'"),
        (ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand, _) => {
            "a command is missing".into()
        }
        (ErrorKind::InvalidSubcommand, _) => {
            format!("unknown command '{}'", context(ContextKind::InvalidSubcommand).unwrap_or_default())
        }
        // The first paragraph; after it come hints and usage.
        _ => rendered.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").into(),
    };
    format!("{problem}; see '{} --help'", command_of(arguments))
}

/// The command that the arguments name, as far as they name one.
fn command_of(arguments: impl Iterator<Item = String>) -> String {
    let root = command();
    let (mut command, mut path) = (&root, "sluice".to_owned());
    for argument in arguments {
        if let Some(next) = command.find_subcommand(&argument) {
            command = next;
            path = format!("{path} {argument}");
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_sound() {
        command().debug_assert();
    }

    fn complaint(line: &str) -> String {
        let error = command().try_get_matches_from(line.split(' ')).unwrap_err();
        explain(&error, line.split(' ').skip(1).map(String::from))
    }

    #[test]
    fn complaints_are_one_line_with_a_way_out() {
        let cases = [
            ("sluice", "a command is missing; see 'sluice --help'"),
            ("sluice port", "a command is missing; see 'sluice port --help'"),
            ("sluice fly", "unknown command 'fly'; see 'sluice --help'"),
            (
                "sluice status --control /x",
                "'--control' is for 'sluice run'; the other commands take '--socket'; see 'sluice status --help'",
            ),
            ("sluice run --foo", "unknown argument '--foo'; see 'sluice run --help'"),
            (
                "sluice run --mode fast",
                "invalid value 'fast' for '--mode <MODE>': mode must be adaptive, poll or interrupt, not 'fast'; see 'sluice run --help'",
            ),
            (
                "sluice port show",
                "the following required arguments were not provided: <NAME>; see 'sluice port show --help'",
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(one_line(&complaint(line)), expected);
        }
        assert!(complaint("sluice run --port x").contains("not of the form NAME=KIND:TARGET"));
        assert_eq!(one_line("a\n  b\x1b[0m"), "a b\u{fffd}[0m");
    }
}
