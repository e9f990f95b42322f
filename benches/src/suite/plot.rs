//! Plots: drawn as SVG, and from that as PNG.

use anyhow::{Context, Result};
use std::fmt::Write;

use super::markdown::number;
use super::results::{Plot, Set, Spread};

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 78.0;
const BOTTOM: f64 = 56.0;
const INK: &str = "#222";
const FAINT: &str = "#e4e4e4";
/// Colours that are told apart by everybody (Okabe and Ito); the first is ours.
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#8c8c8c", "#cc79a7", "#009e73", "#d55e00"];
/// Dots per unit in PNG files.
const SCALE: f32 = 2.0;

/// Name of the file with a metric's plot.
pub fn file_name(set: &Set, metric: usize, ending: &str) -> String {
    let drawn = set.metrics.iter().filter(|metric| metric.plot != Plot::None).count();
    let name: String = set.metrics[metric].name.chars().filter(char::is_ascii_alphanumeric).collect();
    if drawn > 1 { format!("{}-{name}.{ending}", set.name) } else { format!("{}.{ending}", set.name) }
}

/// The vertical axis.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn new(values: &[f64], log: bool) -> Self {
        let high = values.iter().copied().fold(0.0, f64::max);
        let positive = values.iter().copied().filter(|value| *value > 0.0);
        if log {
            let low = positive.fold(f64::INFINITY, f64::min);
            let (low, high) = if low.is_finite() { (low, high) } else { (0.1, 1.0) };
            return Self { low: 10f64.powf(low.log10().floor()), high: 10f64.powf(high.log10().ceil()), log };
        }
        let step = step(high);
        Self { low: 0.0, high: (high / step).ceil().max(1.0) * step, log }
    }

    fn y(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low).log10() - self.low.log10()) / (self.high.log10() - self.low.log10()).max(1e-9)
        } else {
            value / self.high
        };
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (first, last) = (self.low.log10().round() as i32, self.high.log10().round() as i32);
            return (first..=last).map(|power| 10f64.powi(power)).collect();
        }
        let step = step(self.high);
        (0..=(self.high / step).round() as u32).map(|count| f64::from(count) * step).collect()
    }
}

/// A round distance between lines of the grid, of which there are four to eight.
fn step(high: f64) -> f64 {
    if high <= 0.0 {
        return 1.0;
    }
    let rough = high / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough).unwrap_or(10.0);
    factor * power
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A drawing in the making.
struct Canvas(String);

impl Canvas {
    fn new() -> Self {
        let font = "font-family=\"'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif\"";
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" {font} font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
        ))
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, style: &str, text: &str) {
        let text = escape(text);
        let _ = writeln!(self.0, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{text}</text>");
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(
            self.0,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" \
             stroke-width=\"{width}\"/>"
        );
    }

    fn rect(&mut self, at: (f64, f64), size: (f64, f64), colour: &str) {
        let ((x, y), (width, height)) = (at, size);
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }

    fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// The plot of one metric of a set.
pub fn svg(set: &Set, metric: usize) -> String {
    let (rows, columns) = (set.rows(), set.columns());
    let kind = set.metrics[metric].plot;
    let spreads: Vec<Vec<Option<Spread>>> =
        columns.iter().map(|column| rows.iter().map(|row| set.spread(row, column, metric)).collect()).collect();
    let values: Vec<f64> = spreads.iter().flatten().flatten().map(|spread| spread.max).collect();
    let lows: Vec<f64> = spreads.iter().flatten().flatten().map(|spread| spread.min).collect();
    let axis = Axis::new(&[values, lows].concat(), kind == Plot::Log);
    let mut canvas = Canvas::new();
    frame(&mut canvas, set, metric, &axis);
    legend(&mut canvas, &columns);
    let slot = (WIDTH - LEFT - RIGHT) / rows.len().max(1) as f64;
    let centre = |row: usize| LEFT + slot * (row as f64 + 0.5);
    // Names that do not fit beside each other lie on two lines in turn.
    let crowded = rows.iter().any(|row| 6.5 * row.chars().count() as f64 > slot);
    for (place, row) in rows.iter().enumerate() {
        let lower = if crowded && place % 2 == 1 { 14.0 } else { 0.0 };
        canvas.text(centre(place), HEIGHT - BOTTOM + 18.0 + lower, "middle", &format!("fill=\"{INK}\""), row);
    }
    for (place, column) in spreads.iter().enumerate() {
        if kind == Plot::Bars {
            bars(&mut canvas, column, place, columns.len(), slot, &axis);
        } else {
            curve(&mut canvas, column, place, centre, &axis);
        }
    }
    canvas.finish()
}

fn frame(canvas: &mut Canvas, set: &Set, metric: usize, axis: &Axis) {
    let (name, unit) = (&set.metrics[metric].name, &set.metrics[metric].unit);
    canvas.text(LEFT, 26.0, "start", &format!("fill=\"{INK}\" font-size=\"17\" font-weight=\"bold\""), &set.title);
    let faint = "fill=\"#666\"";
    for tick in axis.ticks() {
        let y = axis.y(tick);
        canvas.line((LEFT, y), (WIDTH - RIGHT, y), FAINT, 1.0);
        canvas.text(LEFT - 8.0, y + 4.5, "end", faint, &tick_text(tick));
    }
    canvas.line((LEFT, axis.y(axis.low)), (WIDTH - RIGHT, axis.y(axis.low)), INK, 1.0);
    canvas.text((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 6.0, "middle", faint, &set.row);
    let middle = (TOP + HEIGHT - BOTTOM) / 2.0;
    let turned = format!("{faint} transform=\"rotate(-90 18 {middle:.1})\"");
    canvas.text(18.0, middle, "middle", &turned, &format!("{name}, {unit}"));
}

fn tick_text(value: f64) -> String {
    if value == value.round() { format!("{value}") } else { format!("{}", (value * 1000.0).round() / 1000.0) }
}

fn legend(canvas: &mut Canvas, columns: &[&str]) {
    let mut x = LEFT;
    for (place, column) in columns.iter().enumerate() {
        canvas.rect((x, 42.0), (12.0, 12.0), COLOURS[place % COLOURS.len()]);
        canvas.text(x + 18.0, 53.0, "start", &format!("fill=\"{INK}\""), column);
        x += 44.0 + 7.5 * column.chars().count() as f64;
    }
}

fn bars(canvas: &mut Canvas, column: &[Option<Spread>], place: usize, columns: usize, slot: f64, axis: &Axis) {
    let width = slot * 0.8 / columns as f64;
    for (row, spread) in column.iter().enumerate() {
        let Some(spread) = spread else {
            continue;
        };
        let x = LEFT + slot * (row as f64 + 0.1) + width * place as f64;
        let (top, base) = (axis.y(spread.median), axis.y(axis.low));
        canvas.rect((x + 1.0, top), ((width - 2.0).max(1.0), base - top), COLOURS[place % COLOURS.len()]);
        whisker(canvas, x + width / 2.0, spread, axis);
        if width >= 24.0 {
            let y = axis.y(spread.max) - 5.0;
            canvas.text(x + width / 2.0, y, "middle", "fill=\"#444\" font-size=\"10.5\"", &number(spread.median));
        }
    }
}

/// The range of all runs.
fn whisker(canvas: &mut Canvas, x: f64, spread: &Spread, axis: &Axis) {
    if spread.max > spread.min {
        canvas.line((x, axis.y(spread.max)), (x, axis.y(spread.min)), "#444", 1.0);
    }
}

fn curve(canvas: &mut Canvas, column: &[Option<Spread>], place: usize, x: impl Fn(usize) -> f64, axis: &Axis) {
    let colour = COLOURS[place % COLOURS.len()];
    let points: Vec<_> = column.iter().enumerate().filter_map(|(row, spread)| Some((x(row), (*spread)?))).collect();
    for pair in points.windows(2) {
        canvas.line((pair[0].0, axis.y(pair[0].1.median)), (pair[1].0, axis.y(pair[1].1.median)), colour, 2.2);
    }
    for (x, spread) in &points {
        whisker(canvas, *x, spread, axis);
        let y = axis.y(spread.median);
        let _ = writeln!(canvas.0, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.6\" fill=\"{colour}\"/>");
    }
}

/// The same as PNG. The font comes with us: bare machines have none.
///
/// # Errors
/// If the drawing is not understood.
pub fn png(svg: &str) -> Result<Vec<u8>> {
    let mut options = resvg::usvg::Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    let family = fonts.faces().next().and_then(|face| Some(face.families.first()?.0.clone()));
    let family = family.context("the font has no name")?;
    fonts.set_sans_serif_family(&family);
    let tree = resvg::usvg::Tree::from_str(svg, &options).context("cannot read the drawing")?;
    let size = (WIDTH as f32 * SCALE, HEIGHT as f32 * SCALE);
    let mut pixels = resvg::tiny_skia::Pixmap::new(size.0 as u32, size.1 as u32).context("no room for the picture")?;
    resvg::render(&tree, resvg::tiny_skia::Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().context("cannot make a PNG")
}

#[cfg(test)]
mod tests {
    use super::super::results::{Cell, Metric};
    use super::*;

    fn set(plot: Plot) -> Set {
        let cell = |row: &str, column: &str, value: f64| Cell {
            row: row.into(),
            column: column.into(),
            samples: vec![vec![value, value * 1.1]],
            ..Cell::default()
        };
        Set {
            name: "x".into(),
            title: "A & B".into(),
            row: "frame".into(),
            metrics: vec![Metric { name: "p99.9".into(), unit: "Mpps".into(), plot }],
            cells: vec![cell("64", "a", 20.0), cell("64", "b", 10.0), cell("1514", "a", 0.5)],
            ..Set::default()
        }
    }

    #[test]
    fn every_kind_becomes_a_picture() {
        for plot in [Plot::Bars, Plot::Lines, Plot::Log] {
            let svg = svg(&set(plot), 0);
            assert!(svg.contains("A &amp; B") && svg.contains(">1514<"), "{svg}");
            let drawn = svg.matches(COLOURS[0]).count();
            assert!(drawn >= 3, "two points and the legend: {drawn}\n{svg}");
            let png = png(&svg).unwrap();
            assert_eq!(&png[1..4], b"PNG");
            // Text is there, which a missing font would leave out.
            let picture = resvg::tiny_skia::Pixmap::decode_png(&png).unwrap();
            let dark = picture.pixels().iter().filter(|pixel| pixel.red() < 80 && pixel.green() < 80).count();
            assert!(dark > 2000, "only {dark} dark dots");
        }
        assert_eq!(file_name(&set(Plot::Bars), 0, "svg"), "x.svg");
    }

    #[test]
    fn grids_are_round() {
        assert_eq!(step(23.0), 5.0);
        assert_eq!(step(9.0), 2.0);
        assert_eq!(step(0.4), 0.1);
        assert_eq!(Axis::new(&[23.0], false).ticks(), [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]);
        assert_eq!(Axis::new(&[0.7, 45.0], true).ticks(), [0.1, 1.0, 10.0, 100.0]);
    }
}
