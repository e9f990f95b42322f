//! Output for people and machines.

use std::io::{self, Write};

use serde::Serialize;

use super::Failure;

/// Writes text to standard output.
pub(crate) fn emit(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::OutputClosed),
        Err(error) => Err(Failure::Failed(format!("cannot write the output: {error}"))),
    }
}

/// Writes a value as indented JSON.
pub(crate) fn emit_json(value: &impl Serialize) -> Result<(), Failure> {
    emit(&(serde_json::to_string_pretty(value).map_err(Failure::failed)? + "\n"))
}

/// Tells machines what was done. To people, success is silent.
pub(crate) fn done(json: bool, what: &impl Serialize) -> Result<(), Failure> {
    if json { emit_json(what) } else { Ok(()) }
}

/// Writes a value as JSON in one line, for streams.
pub(crate) fn emit_json_line(value: &impl Serialize) -> Result<(), Failure> {
    emit(&(serde_json::to_string(value).map_err(Failure::failed)? + "\n"))
}

/// An aligned table. Columns whose title starts with `>` are aligned to the right, the others to the left.
pub(crate) fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let (right, titles): (Vec<bool>, Vec<String>) =
        titles.iter().map(|title| (title.starts_with('>'), title.trim_start_matches('>').to_owned())).unzip();
    let lines = || std::iter::once(&titles).chain(rows);
    let width = |column: usize| lines().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..titles.len()).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines() {
        let cells = line.iter().zip(&widths).zip(&right).map(|((cell, width), right)| match right {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Names and values below each other.
pub(crate) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    fields.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

/// A value, or a dash if there is none.
pub(crate) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// A time in its two largest units.
pub(crate) fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// A size in the largest binary unit that leaves a whole number in front.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = [vec!["a".into(), "1".into(), "x".into()], vec!["bcd".into(), "1000".into(), "".into()]];
        assert_eq!(table(&["NAME", ">N", "T"], &rows), "NAME     N  T\na        1  x\nbcd   1000\n");
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }

    #[test]
    fn units() {
        assert_eq!(
            [duration(59), duration(61), duration(3660), duration(90_000)],
            ["59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]
        );
        assert_eq!([size(5), size(2048), size(3 << 20), size(1 << 30)], ["5 B", "2.0 KiB", "3.0 MiB", "1.0 GiB"]);
    }
}
