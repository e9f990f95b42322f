//! `sluice fdb`.

use std::path::Path;

use sluice_proto::sluice::v1 as proto;

use super::Failure;
use super::args::FdbCommand;
use super::client::{Client, ask, refused, with_client};
use super::output::{duration, emit, emit_json, table};

pub(crate) fn run(command: FdbCommand, socket: &Path, json: bool) -> Result<(), Failure> {
    match command {
        FdbCommand::Show { network } => show(network, socket, json),
        FdbCommand::Flush { network } => {
            let request = proto::FlushFdbRequest { network };
            let response = ask(socket, async |client| client.flush_fdb(request).await)?;
            if json { emit_json(&response) } else { emit(&format!("{} addresses forgotten\n", response.flushed)) }
        }
    }
}

fn show(network: Option<String>, socket: &Path, json: bool) -> Result<(), Failure> {
    let entries = with_client(socket, async |mut client: Client| {
        let mut pieces = client.list_fdb(proto::ListFdbRequest { network }).await.map_err(refused)?.into_inner();
        let mut entries = Vec::new();
        while let Some(piece) = pieces.message().await.map_err(refused)? {
            entries.extend(piece.entries);
        }
        Ok(entries)
    })?;
    if json {
        return emit_json(&entries);
    }
    let rows: Vec<_> = entries.iter().map(row).collect();
    emit(&table(&["NETWORK", ">VLAN", "MAC", "PORT", ">AGE"], &rows))
}

fn row(entry: &proto::FdbEntry) -> Vec<String> {
    vec![
        entry.network.clone(),
        if entry.vlan == 0 { "-".into() } else { entry.vlan.to_string() },
        entry.mac.clone(),
        entry.port.clone(),
        if entry.r#static { "static".into() } else { duration(entry.age_seconds) },
    ]
}
