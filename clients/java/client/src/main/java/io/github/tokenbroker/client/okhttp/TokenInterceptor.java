package io.github.tokenbroker.client.okhttp;

import io.github.tokenbroker.client.RefusedToken;
import io.github.tokenbroker.client.Token;
import io.github.tokenbroker.client.TokenBrokerException;
import io.github.tokenbroker.client.TokenClient;
import java.io.IOException;
import java.time.Duration;
import java.util.Objects;
import java.util.Optional;
import okhttp3.Interceptor;
import okhttp3.OkHttpClient;
import okhttp3.Request;
import okhttp3.RequestBody;
import okhttp3.Response;

/**
 * Sends the token of an account with each request of OkHttp, and sends a request again, once, if
 * the API refused the token. Calls fail with an {@link IOException} whose cause is a {@link
 * TokenBrokerException} if there is no token, or if a request or a redirect goes to another host
 * than that of the API.
 */
public final class TokenInterceptor implements Interceptor {
  private final TokenClient client;
  private final String account;
  private final Duration timeout;

  private TokenInterceptor(TokenClient client, String account, Duration timeout) {
    this.client = client;
    this.account = account;
    this.timeout = timeout;
  }

  /**
   * Adds the interceptor to a builder.
   *
   * @param builder a builder of OkHttp
   * @param client the client that has the tokens
   * @param account the account whose token is sent
   * @return the same builder
   */
  public static OkHttpClient.Builder addTo(
      OkHttpClient.Builder builder, TokenClient client, String account) {
    return addTo(builder, client, account, client.timeout());
  }

  /**
   * Adds the interceptor to a builder, with a timeout of its own.
   *
   * @param builder a builder of OkHttp
   * @param client the client that has the tokens
   * @param account the account whose token is sent
   * @param timeout how long a request waits at most for a token, and again for another one if the
   *     API refused the first
   * @return the same builder
   */
  public static OkHttpClient.Builder addTo(
      OkHttpClient.Builder builder, TokenClient client, String account, Duration timeout) {
    return builder
        .addInterceptor(new TokenInterceptor(client, account, timeout))
        .addNetworkInterceptor(TokenInterceptor::checkHost);
  }

  @Override
  public Response intercept(Chain chain) throws IOException {
    try {
      Token token = client.token(account, timeout);
      Response response = send(chain, token);
      Optional<String> code = refusal(response);
      if (code.isEmpty()) {
        return response;
      }
      Optional<Token> newer = client.replace(token, code.get(), timeout);
      RequestBody body = chain.request().body();
      if (newer.isEmpty() || (body != null && (body.isOneShot() || body.isDuplex()))) {
        return response;
      }
      response.close();
      return send(chain, newer.get());
    } catch (TokenBrokerException error) {
      throw asIoException(error);
    }
  }

  private static Response send(Chain chain, Token token) throws IOException {
    RefusedToken.checkHost(token, chain.request().url().uri());
    return chain.proceed(
        chain
            .request()
            .newBuilder()
            .header("Authorization", "Bearer " + token.value())
            .tag(Token.class, token)
            .build());
  }

  /** Checks the host of each request that goes out, so those that follow redirects too. */
  private static Response checkHost(Chain chain) throws IOException {
    Request request = chain.request();
    try {
      RefusedToken.checkHost(Objects.requireNonNull(request.tag(Token.class)), request.url().uri());
    } catch (TokenBrokerException error) {
      throw asIoException(error);
    }
    return chain.proceed(request);
  }

  private static Optional<String> refusal(Response response) {
    if (response.code() < 400) {
      return Optional.empty();
    }
    try {
      byte[] body = response.peekBody(RefusedToken.LONGEST_BODY + 1L).bytes();
      return RefusedToken.code(response.code(), body);
    } catch (IOException broken) {
      // The program gets it when it reads the body.
      return Optional.empty();
    }
  }

  /** OkHttp tells a program only of exceptions of this type. */
  private static IOException asIoException(TokenBrokerException error) {
    return new IOException(error.getMessage(), error);
  }
}
