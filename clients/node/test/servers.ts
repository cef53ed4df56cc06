// A broker and an API on loopback, for tests of what goes over the wire.
import {
  createServer,
  type IncomingMessage,
  type Server as HttpServer,
  type ServerResponse,
} from 'node:http';
import type { AddressInfo } from 'node:net';

import { create, type DescMethod, fromBinary, type Message, toBinary } from '@bufbuild/protobuf';
import { anyPack } from '@bufbuild/protobuf/wkt';
import {
  Metadata,
  type sendUnaryData,
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServerWritableStream,
  status,
  type StatusObject,
} from '@grpc/grpc-js';

import { ErrorInfoSchema, RetryInfoSchema, StatusSchema } from '../src/gen/google/rpc/details_pb.js';
import {
  type GetTokenRequest,
  type GetTokenResponse,
  type ReportRejectedTokenRequest,
  type ReportRejectedTokenResponse,
  TokenService,
  type WatchTokensRequest,
  type WatchTokensResponse,
} from '../src/gen/token_broker/v1/token_broker_pb.js';
import { reportAnswer, tokenAnswer } from './fakes.js';

/** A broker with one bearer and one token of each account. A report replaces the token. */
export class WireBroker {
  bearer = 'tbk_first';
  generation = 1n;
  apiBaseUrl = 'http://127.0.0.1:9';
  /** What the next calls of `GetToken` fail with. */
  failures: Partial<StatusObject>[] = [];
  asks = 0;
  reports: ReportRejectedTokenRequest[] = [];
  readonly #server = new Server();
  #port = 0;

  async start(): Promise<this> {
    this.#server.addService(
      {
        getToken: definition(TokenService.method.getToken),
        watchTokens: definition(TokenService.method.watchTokens),
        reportRejectedToken: definition(TokenService.method.reportRejectedToken),
      },
      {
        getToken: (
          call: ServerUnaryCall<GetTokenRequest, GetTokenResponse>,
          done: sendUnaryData<unknown>,
        ) => {
          this.asks++;
          const failure = this.#refusal(call.metadata) ?? this.failures.shift();
          done(failure ?? null, this.#token());
        },
        watchTokens: (stream: ServerWritableStream<WatchTokensRequest, WatchTokensResponse>) => {
          const failure = this.#refusal(stream.metadata);
          if (failure) {
            stream.emit('error', failure);
          } else {
            stream.sendMetadata(new Metadata());
          }
        },
        reportRejectedToken: (
          call: ServerUnaryCall<ReportRejectedTokenRequest, ReportRejectedTokenResponse>,
          done: sendUnaryData<unknown>,
        ) => {
          this.reports.push(call.request);
          const failure = this.failures.shift();
          if (failure) {
            done(failure);
            return;
          }
          this.generation++;
          done(null, reportAnswer('REISSUING'));
        },
      },
    );
    this.#port = await new Promise((resolve, reject) => {
      this.#server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, port) => {
        if (error) {
          reject(error);
        } else {
          resolve(port);
        }
      });
    });
    return this;
  }

  get endpoint(): string {
    return `http://127.0.0.1:${this.#port}`;
  }

  stop(): void {
    this.#server.forceShutdown();
  }

  #token(): GetTokenResponse {
    const { generation, apiBaseUrl } = this;
    return tokenAnswer({ generation, apiBaseUrl });
  }

  #refusal(metadata: Metadata): Partial<StatusObject> | undefined {
    return metadata.get('authorization')[0] === `Bearer ${this.bearer}`
      ? undefined
      : refusal(status.UNAUTHENTICATED, 'CREDENTIAL_REFUSED');
  }
}

/** Returns a status as the broker sends it. */
export function refusal(
  code: status,
  reason: string,
  retrySeconds?: bigint,
  domain = 'token-broker',
): Partial<StatusObject> {
  const info = create(ErrorInfoSchema, {
    reason,
    domain,
    metadata: { upstream_code: '61006' },
  });
  const details = [anyPack(ErrorInfoSchema, info)];
  if (retrySeconds !== undefined) {
    const retry = create(RetryInfoSchema, { retryDelay: { seconds: retrySeconds } });
    details.push(anyPack(RetryInfoSchema, retry));
  }
  const metadata = new Metadata();
  const encoded = toBinary(StatusSchema, create(StatusSchema, { code, details }));
  metadata.set('grpc-status-details-bin', Buffer.from(encoded));
  return { code, details: 'as the test says', metadata };
}

function definition(method: DescMethod) {
  return {
    path: `/${method.parent.typeName}/${method.name}`,
    requestStream: false,
    responseStream: method.methodKind === 'server_streaming',
    requestSerialize: (message: Message) => Buffer.from(toBinary(method.input, message)),
    requestDeserialize: (bytes: Buffer) => fromBinary(method.input, bytes),
    responseSerialize: (message: Message) => Buffer.from(toBinary(method.output, message)),
    responseDeserialize: (bytes: Buffer) => fromBinary(method.output, bytes),
  };
}

export interface Received {
  method: string | undefined;
  url: string | undefined;
  authorization: string | undefined;
  body: string;
}

/** An API that records what it gets. */
export class Api {
  readonly received: Received[] = [];
  readonly #server: HttpServer;

  constructor(answer: (request: Received, response: ServerResponse) => void) {
    this.#server = createServer((request, response) => {
      void this.#handle(request, response, answer);
    });
  }

  async start(): Promise<this> {
    await new Promise<void>((resolve) => this.#server.listen(0, '127.0.0.1', resolve));
    return this;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  stop(): void {
    this.#server.close();
    this.#server.closeAllConnections();
  }

  async #handle(
    request: IncomingMessage,
    response: ServerResponse,
    answer: (request: Received, response: ServerResponse) => void,
  ) {
    const chunks: Buffer[] = [];
    for await (const chunk of request) {
      chunks.push(chunk as Buffer);
    }
    const { method, url, headers } = request;
    const { authorization } = headers;
    const received = { method, url, authorization, body: Buffer.concat(chunks).toString() };
    this.received.push(received);
    answer(received, response);
  }
}
