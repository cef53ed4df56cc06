import { fromBinary } from '@bufbuild/protobuf';
import { type Metadata, status as Code } from '@grpc/grpc-js';

import { type ErrorKind, TokenBrokerError } from './errors.js';
import { ErrorInfoSchema, RetryInfoSchema, StatusSchema } from './gen/google/rpc/details_pb.js';
import { milliseconds } from './token.js';

/** The domain of the broker's reasons. What a proxy adds has another one. */
const DOMAIN = 'token-broker';

/** The parts of a gRPC status from which an error is made. */
export interface CallStatus {
  code: Code;
  details: string;
  metadata: Metadata;
}

/** Returns the error that a status of a call for `account` stands for. */
export function errorFromStatus(status: CallStatus, account: string | undefined): TokenBrokerError {
  const details = statusDetails(status.metadata);
  return new TokenBrokerError(kindOf(status.code, details.reason), status.details, {
    account,
    code: Code[status.code],
    ...details,
    noRetry: Number(status.metadata.get('grpc-retry-pushback-ms')[0]) < 0,
  });
}

/** Returns the kind of error for a gRPC code and the broker's reason. */
export function kindOf(code: Code, reason: string | undefined): ErrorKind {
  switch (code) {
    case Code.INVALID_ARGUMENT:
      return 'INVALID_ARGUMENT';
    case Code.UNAUTHENTICATED:
      return 'UNAUTHENTICATED';
    case Code.PERMISSION_DENIED:
      return 'NOT_GRANTED';
    case Code.NOT_FOUND:
      return 'NO_SUCH_ACCOUNT';
    case Code.UNAVAILABLE:
      return 'UNAVAILABLE';
    case Code.RESOURCE_EXHAUSTED:
      return 'OVERLOADED';
    case Code.DEADLINE_EXCEEDED:
      return 'DEADLINE_EXCEEDED';
    case Code.FAILED_PRECONDITION:
      return reason === 'ACCOUNT_DISABLED' || reason === 'CREDENTIAL_REJECTED' || reason === 'EGRESS_REJECTED'
        ? reason
        : 'INTERNAL';
    default:
      return 'INTERNAL';
  }
}

interface StatusDetails {
  reason?: string;
  upstreamCode?: string | undefined;
  retryAfterMs?: number;
}

function statusDetails(metadata: Metadata): StatusDetails {
  const found: StatusDetails = {};
  const [encoded] = metadata.get('grpc-status-details-bin');
  if (!Buffer.isBuffer(encoded)) {
    return found;
  }
  try {
    for (const detail of fromBinary(StatusSchema, encoded).details) {
      if (detail.typeUrl.endsWith('/google.rpc.ErrorInfo')) {
        const info = fromBinary(ErrorInfoSchema, detail.value);
        if (info.domain === DOMAIN) {
          found.reason = info.reason;
          found.upstreamCode = info.metadata.upstream_code;
        }
      } else if (detail.typeUrl.endsWith('/google.rpc.RetryInfo')) {
        const { retryDelay } = fromBinary(RetryInfoSchema, detail.value);
        if (retryDelay) {
          found.retryAfterMs = milliseconds(retryDelay);
        }
      }
    }
  } catch {
    // Details that cannot be read explain nothing; the code and the text remain.
  }
  return found;
}
