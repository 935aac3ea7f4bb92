//! The states of jobs and of runs, and what may become of what. The database refuses any other change (migration 0021).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A word that is no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no state")]
pub struct UnknownState(String);

macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $($(#[$state_doc:meta])* $state:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name {
            $($(#[$state_doc])* $state,)+
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$state),+];

            /// As the database, the API and the program write it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$state => $text,)+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownState;

            fn from_str(text: &str) -> Result<Self, UnknownState> {
                let known = Self::ALL.iter().copied().find(|state| state.as_str() == text);
                known.ok_or_else(|| UnknownState(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = UnknownState;

            fn try_from(text: String) -> Result<Self, UnknownState> {
                text.parse()
            }
        }

        impl PartialEq<&str> for $name {
            fn eq(&self, other: &&str) -> bool {
                self.as_str() == *other
            }
        }
    };
}

states! {
    /// How a job stands.
    JobState {
        /// For its time, or for a worker.
        Waiting = "waiting",
        /// A worker has taken it.
        Running = "running",
        /// Ended as it was meant to.
        Succeeded = "succeeded",
        /// Ended because a person wanted it.
        Cancelled = "cancelled",
        /// Ended without success: a dead letter.
        Dead = "dead",
        /// Its run needs a person.
        Parked = "parked",
    }
}

states! {
    /// How a saga's run stands.
    RunState {
        /// On its way forward.
        Running = "running",
        /// On its way back, for good.
        Compensating = "compensating",
        /// Its effect is seen by readers; what it replaced is still being removed.
        Finishing = "finishing",
        /// Ended with its effect.
        Completed = "completed",
        /// Ended without any.
        Compensated = "compensated",
        /// Can neither go on nor back without a person.
        Parked = "parked",
    }
}

impl JobState {
    /// Whether a job in this state may come into the other. What has ended stays as it ended.
    pub const fn may_become(self, next: Self) -> bool {
        match self {
            Self::Waiting => matches!(next, Self::Running | Self::Cancelled),
            Self::Running => !matches!(next, Self::Running),
            Self::Parked => !matches!(next, Self::Running | Self::Parked),
            Self::Succeeded | Self::Cancelled | Self::Dead => false,
        }
    }

    /// Whether nothing follows.
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Cancelled | Self::Dead)
    }
}

impl RunState {
    /// Whether a run in this state may come into the other. One that has turned back never goes forward, unless a person says so.
    pub const fn may_become(self, next: Self) -> bool {
        match self {
            Self::Running => !matches!(next, Self::Running),
            Self::Finishing => matches!(next, Self::Completed),
            Self::Compensating => matches!(next, Self::Compensated | Self::Parked),
            Self::Parked => !matches!(next, Self::Finishing | Self::Parked),
            Self::Completed | Self::Compensated => false,
        }
    }

    /// Whether nothing follows.
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_follows_what_has_ended_and_words_are_read_as_they_are_written() {
        for state in JobState::ALL {
            let ends = JobState::ALL.iter().all(|next| !state.may_become(*next));
            assert_eq!(ends, state.has_ended(), "{state}");
            assert_eq!(state.as_str().parse(), Ok(*state));
        }
        for state in RunState::ALL {
            let ends = RunState::ALL.iter().all(|next| !state.may_become(*next));
            assert_eq!(ends, state.has_ended(), "{state}");
            assert_eq!(serde_json::to_value(state).ok(), Some(state.as_str().into()));
        }
        assert_eq!("asleep".parse::<JobState>(), Err(UnknownState("asleep".to_owned())));
    }
}
