//! Which gRPC status an error becomes. The codes are those of a Qdrant server; the texts may differ.

use std::fmt::Display;

use qdrant_edge::OperationError;
use tonic::Status;

/// What every part of a request handler returns.
pub type Answer<T> = Result<T, Status>;

/// INVALID_ARGUMENT: the request itself is wrong, and sending it again cannot help.
pub fn invalid(message: impl Display) -> Status {
    Status::invalid_argument(message.to_string())
}

/// NOT_FOUND for a collection or alias.
pub fn no_collection(name: &str) -> Status {
    Status::not_found(format!("Not found: Collection `{name}` doesn't exist!"))
}

/// INTERNAL for a failed file operation of our own, naming what was attempted.
pub fn file_error(what: &str, error: &std::io::Error) -> Status {
    Status::internal(format!("{what}: {error}"))
}

/// The status of an engine error: its own faults are INTERNAL, a missing point is NOT_FOUND, the rest blames the
/// request.
pub fn from_engine(error: OperationError) -> Status {
    use OperationError as E;
    let message = error.to_string();
    match error {
        E::ServiceError { .. }
        | E::InconsistentStorage { .. }
        | E::FileNotFound { .. }
        | E::OutOfAppendableCapacity { .. } => Status::internal(message),
        E::OutOfMemory { .. } => Status::resource_exhausted(message),
        E::Timeout { .. } => Status::deadline_exceeded(message),
        E::Cancelled { .. } => Status::cancelled(message),
        E::PointIdError { .. } => Status::not_found(message),
        E::WrongVectorDimension { .. }
        | E::MalformedVectorBlob { .. }
        | E::MalformedPayloadBlob { .. }
        | E::VectorNameNotExists { .. }
        | E::TypeError { .. }
        | E::TypeInferenceError { .. }
        | E::ValidationError { .. }
        | E::WrongSparse
        | E::WrongMulti
        | E::MissingRangeIndexForOrderBy { .. }
        | E::MissingMapIndexForFacet { .. }
        | E::VariableTypeError { .. }
        | E::NonFiniteNumber { .. } => Status::invalid_argument(message),
    }
}
