import { render } from "preact";

import * as session from "./api/session";
import * as who from "./api/who";
import { App } from "./App";
import * as router from "./router";
import "./style.css";
import * as theme from "./theme";

// The token leaves the address bar before anything else happens.
session.start();
router.start();
theme.start();
who.start();
const place = document.getElementById("app");
if (place) render(<App />, place);
