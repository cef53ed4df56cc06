package io.github.tokenbroker.client.spring;

import io.github.tokenbroker.client.RefusedToken;
import io.github.tokenbroker.client.Token;
import io.github.tokenbroker.client.TokenClient;
import java.time.Duration;
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
    // Bodies of errors without a length are short in practice, so the whole body is read.
    return DataBufferUtils.join(response.bodyToFlux(DataBuffer.class))
        .map(TokenExchangeFilter::bytes)
        .defaultIfEmpty(new byte[0])
        .map(body -> new Answer(withBody(response, body), body));
  }

  private static byte[] bytes(DataBuffer buffer) {
    byte[] bytes = new byte[buffer.readableByteCount()];
    buffer.read(bytes);
    DataBufferUtils.release(buffer);
    return bytes;
  }

  /** Returns the same answer with a body that was read already. */
  private static ClientResponse withBody(ClientResponse response, byte[] body) {
    return ClientResponse.create(response.statusCode(), response.strategies())
        .headers(headers -> headers.addAll(response.headers().asHttpHeaders()))
        .cookies(cookies -> cookies.addAll(response.cookies()))
        .request(response.request())
        .body(Flux.defer(() -> Flux.just(DefaultDataBufferFactory.sharedInstance.wrap(body))))
        .build();
  }

  /** An answer, and its body as far as a code is looked for in it. */
  private static final class Answer {
    private final ClientResponse response;
    private final byte[] body;

    Answer(ClientResponse response, byte[] body) {
      this.response = response;
      this.body = body;
    }
  }
}
