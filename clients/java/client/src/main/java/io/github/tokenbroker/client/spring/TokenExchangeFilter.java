package io.github.tokenbroker.client.spring;

import io.github.tokenbroker.client.RefusedToken;
import io.github.tokenbroker.client.Token;
import io.github.tokenbroker.client.TokenClient;
import java.io.ByteArrayOutputStream;
import java.time.Duration;
import java.util.List;
import java.util.Optional;
import org.springframework.core.io.buffer.DataBuffer;
import org.springframework.core.io.buffer.DataBufferUtils;
import org.springframework.core.io.buffer.DefaultDataBufferFactory;
import org.springframework.web.reactive.function.client.ClientRequest;
import org.springframework.web.reactive.function.client.ClientResponse;
import org.springframework.web.reactive.function.client.ExchangeFilterFunction;
import org.springframework.web.reactive.function.client.ExchangeFunction;
import reactor.core.publisher.Flux;
import reactor.core.publisher.Mono;
import reactor.core.publisher.Signal;

/**
 * Sends the token of an account with each request of {@code WebClient}, and sends a request again,
 * once, if the API refused the token. Requests fail with a {@link
 * io.github.tokenbroker.client.TokenBrokerException} if there is no token, or if a request or a
 * redirect goes to another host than that of the API.
 *
 * <p>A filter does not see redirects that the connector follows itself; those of Reactor Netty and
 * the JDK follow none unless they are told to. A body that is a publisher is subscribed to again
 * when a request is sent again.
 */
public final class TokenExchangeFilter implements ExchangeFilterFunction {
  private final TokenClient client;
  private final String account;
  private final Duration timeout;

  /**
   * Makes a filter.
   *
   * @param client the client that has the tokens
   * @param account the account whose token is sent
   */
  public TokenExchangeFilter(TokenClient client, String account) {
    this(client, account, client.timeout());
  }

  /**
   * Makes a filter with a timeout of its own.
   *
   * @param client the client that has the tokens
   * @param account the account whose token is sent
   * @param timeout how long a request waits at most for a token, and again for another one if the
   *     API refused the first
   */
  public TokenExchangeFilter(TokenClient client, String account, Duration timeout) {
    this.client = client;
    this.account = account;
    this.timeout = timeout;
  }

  @Override
  public Mono<ClientResponse> filter(ClientRequest request, ExchangeFunction next) {
    return Mono.fromFuture(() -> client.tokenAsync(account, timeout))
        .flatMap(
            token ->
                send(token, request, next)
                    .flatMap(answer -> repeatIfRefused(token, answer, request, next)));
  }

  private Mono<ClientResponse> repeatIfRefused(
      Token token, Answer answer, ClientRequest request, ExchangeFunction next) {
    Optional<String> code = RefusedToken.code(answer.response.statusCode().value(), answer.body);
    if (code.isEmpty()) {
      return Mono.just(answer.response);
    }
    return Mono.fromFuture(() -> client.replaceAsync(token, code.get(), timeout))
        .flatMap(
            newer ->
                newer.isEmpty()
                    ? Mono.just(answer.response)
                    : answer
                        .response
                        .releaseBody()
                        .then(send(newer.get(), request, next).map(second -> second.response)));
  }

  private static Mono<Answer> send(Token token, ClientRequest request, ExchangeFunction next) {
    return Mono.defer(
        () -> {
          RefusedToken.checkHost(token, request.url());
          ClientRequest authorized =
              ClientRequest.from(request)
                  .headers(headers -> headers.setBearerAuth(token.value()))
                  .build();
          return next.exchange(authorized).flatMap(response -> answer(token, request, response));
        });
  }

  private static Mono<Answer> answer(Token token, ClientRequest request, ClientResponse response) {
    try {
      Redirects.check(
          token, request.url(), response.statusCode(), response.headers().asHttpHeaders());
    } catch (RuntimeException error) {
      return response.releaseBody().then(Mono.error(error));
    }
    long length = response.headers().contentLength().orElse(0);
    if (!response.statusCode().isError() || length > RefusedToken.LONGEST_BODY) {
      return Mono.just(new Answer(response, new byte[0]));
    }
    // The first element has all that is searched for a code, or how the body ended before that.
    int[] size = {0};
    return response
        .bodyToFlux(DataBuffer.class)
        .map(TokenExchangeFilter::bytes)
        .materialize()
        .bufferUntil(
            part -> !part.isOnNext() || (size[0] += part.get().length) > RefusedToken.LONGEST_BODY)
        .switchOnFirst((first, all) -> Mono.just(peeked(response, first.get(), all)), false)
        .single();
  }

  /** Returns an answer of whose body some has been read, which the program gets all the same. */
  private static Answer peeked(
      ClientResponse response, List<Signal<byte[]>> head, Flux<List<Signal<byte[]>>> all) {
    Signal<byte[]> last = head.get(head.size() - 1);
    // What was read entirely, up to its end or its failure, can be read any number of times.
    Flux<Signal<byte[]>> body =
        last.isOnNext() ? all.concatMapIterable(parts -> parts, 1) : Flux.fromIterable(head);
    return new Answer(
        withBody(response, body.dematerialize()), last.isOnComplete() ? joined(head) : new byte[0]);
  }

  private static byte[] joined(List<Signal<byte[]>> parts) {
    ByteArrayOutputStream bytes = new ByteArrayOutputStream();
    parts.stream().filter(Signal::isOnNext).forEach(part -> bytes.writeBytes(part.get()));
    return bytes.toByteArray();
  }

  private static byte[] bytes(DataBuffer buffer) {
    byte[] bytes = new byte[buffer.readableByteCount()];
    buffer.read(bytes);
    DataBufferUtils.release(buffer);
    return bytes;
  }

  /** Returns the same answer with another source of its body. */
  private static ClientResponse withBody(ClientResponse response, Flux<byte[]> body) {
    return ClientResponse.create(response.statusCode(), response.strategies())
        .headers(headers -> headers.addAll(response.headers().asHttpHeaders()))
        .cookies(cookies -> cookies.addAll(response.cookies()))
        .request(response.request())
        .body(body.map(DefaultDataBufferFactory.sharedInstance::wrap))
        .build();
  }

  /** An answer, and its body if that is complete and short enough to have a code. */
  private static final class Answer {
    private final ClientResponse response;
    private final byte[] body;

    Answer(ClientResponse response, byte[] body) {
      this.response = response;
      this.body = body;
    }
  }
}
