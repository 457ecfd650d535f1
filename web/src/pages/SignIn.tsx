// Asks for a token when the coordinator wants one.

import { useState } from "preact/hooks";

import { signIn } from "../api/session";

export function SignIn({ reason }: { reason: string }) {
  const [value, setValue] = useState("");
  return (
    <form
      class="sign-in"
      onSubmit={(event) => {
        event.preventDefault();
        signIn(value);
      }}
    >
      <h1>Sign in</h1>
      <p>{reason}</p>
      <label>
        Token
        <input type="password" value={value} onInput={({ currentTarget }) => setValue(currentTarget.value)} autocomplete="current-password" autofocus required />
      </label>
      <button type="submit">Sign in</button>
    </form>
  );
}
