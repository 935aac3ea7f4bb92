//! How the server says no. A request that sets a field we don't serve is refused with UNIMPLEMENTED naming the
//! field; nothing is silently ignored. Handlers take each message apart field by field (no `..`), so that a field
//! added to the API breaks the build until someone decides about it.

use tonic::Status;

use crate::status::Answer;

/// UNIMPLEMENTED, naming the field, variant or method.
pub fn unsupported(what: &str) -> Status {
    Status::unimplemented(format!(
        "`{what}` is not supported by flotilla-vectors, the development vector server: leave it out, or use a \
         Qdrant server"
    ))
}

/// Refuses the field if it is set.
#[expect(clippy::ref_option, reason = "takes fields as they stand in the message")]
pub fn absent<T>(field: &str, value: &Option<T>) -> Answer<()> {
    if value.is_some() { Err(unsupported(field)) } else { Ok(()) }
}

/// Refuses the field unless it is unset or has the one value that is true of a single node.
pub fn only<T: PartialEq>(field: &str, value: Option<T>, allowed: &T) -> Answer<()> {
    match value {
        Some(value) if value != *allowed => Err(unsupported(field)),
        _ => Ok(()),
    }
}

/// Implements gRPC methods that only refuse. The generated traits have no default bodies, and `async_trait` does
/// not look into macros, so this writes the signature that `async_trait` would.
macro_rules! unsupported_methods {
    ($($method:ident: $request:ident -> $response:ident;)*) => {$(
        fn $method<'life0, 'async_trait>(
            &'life0 self,
            _request: tonic::Request<pb::$request>,
        ) -> std::pin::Pin<Box<
            dyn Future<Output = Result<tonic::Response<pb::$response>, tonic::Status>> + Send + 'async_trait,
        >>
        where
            'life0: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(async { Err($crate::unsupported::unsupported(stringify!($method))) })
        }
    )*};
}
pub(crate) use unsupported_methods;
