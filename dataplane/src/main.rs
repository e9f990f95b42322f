//! The `sluice` command: the switch daemon, and the operator's client of it.

use std::process::ExitCode;

mod cli;

#[global_allocator]
static HEAP: sluice::heap::Counting = sluice::heap::Counting;

fn main() -> ExitCode {
    sluice::heap::settle();
    match cli::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
