//! The bar on stderr. Not drawn where stderr is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often the bar is redrawn though nothing happens, so that its times go on.
const TICK: Duration = Duration::from_millis(250);

/// Shows how many of how many, how fast, and how long it will still take.
pub struct Progress(ProgressBar);

impl Progress {
    pub fn new(total: u64, verb: &str) -> Self {
        let bar = ProgressBar::new(total);
        let template = format!("{{pos}}/{{len}} {verb} {{bar:32}} {{per_sec}}, {{eta}} left  {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(
                style
                    .with_key("per_sec", |state: &indicatif::ProgressState, w: &mut dyn std::fmt::Write| {
                        write!(w, "{:.0} docs/s", state.per_sec()).ok();
                    })
                    .progress_chars("█▌ "),
            );
        }
        bar.enable_steady_tick(TICK);
        Self(bar)
    }

    /// Moves on, with a new message.
    pub fn advance(&self, by: u64, message: impl FnOnce() -> String) {
        if !self.0.is_hidden() {
            self.0.set_message(message());
        }
        self.0.inc(by);
    }

    /// Leaves the bar as it is.
    pub fn finish(self) {
        self.0.abandon();
    }
}
